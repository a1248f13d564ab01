//! A bot that writes HTTP/2 itself, for what no gRPC library sends.

use std::io;
use std::time::Duration;

use credbroker::proto::SignAndSendRequest;
use credbroker_sim::pki::Identity;
use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;

use crate::harness::Lab;

/// Kinds of HTTP/2 frames (RFC 9113, section 6).
pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;

/// Flags of frames.
pub(crate) const ACK: u8 = 1;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// A bot that sends HTTP/2 frame by frame and does not reply to SETTINGS, PING or GOAWAY.
pub(crate) struct RawBot {
    pub(crate) stream: TlsStream<TcpStream>,
    next: u32,
}

impl RawBot {
    pub(crate) async fn open(lab: &Lab, identity: &Identity) -> Self {
        let stream = lab.tls(identity).await.unwrap();
        Self::over(stream, &[]).await.unwrap()
    }

    /// Starts HTTP/2 with a SETTINGS frame of this payload.
    pub(crate) async fn over(
        mut stream: TlsStream<TcpStream>,
        settings: &[u8],
    ) -> io::Result<Self> {
        stream
            .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            .await?;
        let mut bot = Self { stream, next: 1 };
        bot.write(SETTINGS, 0, 0, settings).await;
        Ok(bot)
    }

    /// Sends a complete call, unless the connection is closed.
    pub(crate) async fn call(&mut self, request: &SignAndSendRequest) {
        let stream = self.head(&[]).await;
        self.write(DATA, END_STREAM, stream, &message(request))
            .await;
    }

    /// Opens a call with additional headers, and returns its stream id.
    pub(crate) async fn head(&mut self, more: &[(&str, &str)]) -> u32 {
        self.head_of("/credbroker.v1.Broker/SignAndSend", more)
            .await
    }

    /// The same for any method.
    pub(crate) async fn head_of(&mut self, path: &str, more: &[(&str, &str)]) -> u32 {
        let stream = self.next;
        self.next += 2;
        let usual = [
            (":method", "POST"),
            (":scheme", "https"),
            (":path", path),
            (":authority", "localhost"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ];
        // HPACK: literal fields that are not indexed (RFC 7541, section 6.2.2).
        let mut block = Vec::new();
        for (name, value) in usual.iter().chain(more) {
            block.push(0);
            for text in [name, value] {
                block.push(
                    u8::try_from(text.len())
                        .ok()
                        .filter(|&length| length < 127)
                        .unwrap(),
                );
                block.extend(text.as_bytes());
            }
        }
        self.write(HEADERS, END_HEADERS, stream, &block).await;
        stream
    }

    pub(crate) async fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let frame = frame(kind, flags, stream, payload);
        // The broker may have closed the connection.
        let _ = self.stream.write_all(&frame).await;
        let _ = self.stream.flush().await;
    }

    /// Reads the next frame: kind, stream id and payload.
    pub(crate) async fn read(&mut self) -> io::Result<(u8, u32, Vec<u8>)> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await?;
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        self.stream.read_exact(&mut payload).await?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        Ok((head[3], stream, payload))
    }

    /// Reads until a frame of this kind arrives.
    pub(crate) async fn until_frame(&mut self, kind: u8) {
        let wait = async { while self.read().await.unwrap().0 != kind {} };
        timeout(Duration::from_secs(20), wait).await.unwrap();
    }
}

/// An HTTP/2 frame (RFC 9113, section 4.1).
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A message with the length prefix of gRPC.
pub(crate) fn message(request: &SignAndSendRequest) -> Vec<u8> {
    let encoded = request.encode_to_vec();
    let length = u32::try_from(encoded.len()).unwrap();
    let mut framed = vec![0];
    framed.extend(length.to_be_bytes());
    framed.extend(encoded);
    framed
}
