#!/bin/sh
# Makes a database on the first start, as whoever runs this, and then runs what it is told to.
set -e
PATH="$(ls -d /usr/lib/postgresql/*/bin):$PATH"
export PATH
if [ "$1" = postgres ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
	initdb --username=loom --auth=trust --no-sync >/dev/null
fi
exec "$@"
