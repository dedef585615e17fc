//! The streams that the server asks for: each is a WebSocket to the server, connected to one operation on the host.

use std::{sync::Arc, time::Duration};

use anyhow::Context as _;
use futures_util::{SinkExt as _, StreamExt as _, stream::SplitSink, stream::SplitStream};
use loom_api::{
    ApiError, ErrorCode,
    agent::{AgentMessage, StreamKind},
    attach::{MAX_FRAME, ServerControl},
    client::WebSocket,
};
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use uuid::Uuid;

use super::Sidecar;
use crate::protocol::{AttachFrame, AttachInput, AttachOutput, AttachSession, HostError, LogStream};

/// For the other side to answer a close frame.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

type Sink = SplitSink<WebSocket, Message>;
type Source = SplitStream<WebSocket>;

/// Dials a stream and serves it until it ends.
pub(crate) async fn run(sidecar: Arc<Sidecar>, stream: Uuid, kind: StreamKind) {
    let path = format!("/api/agent/streams/{stream}");
    let socket = match sidecar.client().websocket(&path, None, MAX_FRAME).await {
        Ok(socket) => socket,
        Err(error) => {
            tracing::info!(%stream, "cannot dial a stream: {error}");
            let reason = format!("the agent cannot dial back: {error}");
            // If the queue is full, the server finds out by its own timeout.
            let _ = sidecar.outbox.try_send(AgentMessage::StreamFailed { stream, reason });
            return;
        }
    };
    let (sink, source) = socket.split();
    let ended = match kind {
        StreamKind::Attach(query) => match sidecar.host.attach(query).await {
            Ok(session) => attach(session, sink, source).await,
            Err(error) => refuse(&error, sink, source).await,
        },
        StreamKind::Logs { follow } => match sidecar.host.logs(follow).await {
            Ok(stream) => logs(stream, sink, source).await,
            Err(error) => {
                tracing::info!(%stream, "cannot read the logs: {error}");
                close(sink, source).await
            }
        },
    };
    if let Err(error) = ended {
        tracing::debug!(%stream, "a stream broke: {error:#}");
    }
}

/// Sends the attach protocol's error message.
async fn refuse(error: &HostError, mut sink: Sink, source: Source) -> anyhow::Result<()> {
    let code = match error {
        HostError::Refused(_) | HostError::Unreachable { .. } => ErrorCode::WeaverNotReady,
        _ => ErrorCode::Internal,
    };
    let last = serde_json::to_string(&ServerControl::Error(ApiError::new(code, error.to_string())))?;
    sink.send(Message::Text(last.into())).await?;
    close(sink, source).await
}

/// Copies frames between a WebSocket and a terminal until either ends.
async fn attach(session: AttachSession, mut sink: Sink, mut source: Source) -> anyhow::Result<()> {
    let AttachSession { input, output } = session;
    tokio::select! {
        ended = forward_input(&mut source, input) => return ended,
        ended = send_output(output, &mut sink) => ended?,
    }
    close(sink, source).await
}

async fn forward_input(source: &mut Source, mut input: AttachInput) -> anyhow::Result<()> {
    while let Some(frame) = source.next().await {
        let frame = match frame? {
            Message::Binary(bytes) => AttachFrame::Binary(bytes),
            Message::Text(text) => AttachFrame::Text(text.to_string()),
            Message::Close(_) => return Ok(()),
            _ => continue,
        };
        match input.send(frame).await {
            Ok(()) => {}
            // The terminal's last frames will end the stream.
            Err(HostError::Gone) => return std::future::pending().await,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

async fn send_output(mut output: AttachOutput, sink: &mut Sink) -> anyhow::Result<()> {
    while let Some(frame) = output.next().await? {
        sink.send(match frame {
            AttachFrame::Binary(bytes) => Message::Binary(bytes),
            AttachFrame::Text(text) => Message::Text(text.into()),
        })
        .await?;
    }
    Ok(())
}

/// Sends the main program's output until it ends or the client disconnects.
async fn logs(mut logs: LogStream, mut sink: Sink, mut source: Source) -> anyhow::Result<()> {
    let give = async {
        while let Some(bytes) = logs.next().await? {
            sink.send(Message::Binary(bytes)).await?;
        }
        anyhow::Ok(())
    };
    tokio::select! {
        ended = give => ended?,
        // Reads too, to answer pings and notice the close.
        ended = drain(&mut source) => return ended,
    }
    close(sink, source).await
}

/// Reads until the other side disconnects.
async fn drain(source: &mut Source) -> anyhow::Result<()> {
    while let Some(frame) = source.next().await {
        if matches!(frame?, Message::Close(_)) {
            break;
        }
    }
    Ok(())
}

/// Sends a close frame and waits for the answer: a connection closed with unread data is reset, which could lose what
/// was just sent.
async fn close(mut sink: Sink, mut source: Source) -> anyhow::Result<()> {
    let closed = async {
        sink.send(Message::Close(None)).await?;
        drain(&mut source).await
    };
    timeout(CLOSE_TIMEOUT, closed).await.context("the server does not answer the close")?
}
