{{- define "loom.labels" -}}
app.kubernetes.io/name: loom-server
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}
{{- define "loom.selector" -}}
app.kubernetes.io/name: loom-server
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}
