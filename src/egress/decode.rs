//! Decodes answers that are compressed although the request accepts only `identity`.

use std::io::{self, Read};

use bytes::Bytes;
use flate2::read::{DeflateDecoder, MultiGzDecoder, ZlibDecoder};
use http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use http::{HeaderMap, HeaderValue};

use super::SendError;
use super::body::Collector;

/// Decodes `body` according to `headers`, up to `max_bytes`, and removes the headers that no longer apply. `admit` counts the
/// decoded bytes in addition to those of the body.
///
/// A body that cannot be decoded is returned unchanged, with its `content-encoding`. `identity` counts as no encoding.
/// Source: RFC 9110, 8.4; some servers send `deflate` without the zlib frame.
///
/// # Errors
/// When the decoded body is larger than `max_bytes`, or `admit` refuses it.
pub(super) fn decode<E: From<SendError>>(
    headers: &mut HeaderMap,
    body: Bytes,
    max_bytes: usize,
    admit: impl FnMut(usize) -> Result<(), E>,
) -> Result<Bytes, E> {
    if !headers.contains_key(CONTENT_ENCODING) {
        return Ok(body);
    }
    let encoding = encoding(headers);
    let collector = Collector::new(None, max_bytes, admit);
    let decoded = match encoding.as_str() {
        "" => Ok(body.clone()),
        "gzip" | "x-gzip" => read(MultiGzDecoder::new(&body[..]), collector)?,
        "deflate" if is_zlib(&body) => read(ZlibDecoder::new(&body[..]), collector)?,
        "deflate" => read(DeflateDecoder::new(&body[..]), collector)?,
        _ => Err(io::ErrorKind::Unsupported.into()),
    };
    match decoded {
        Ok(decoded) => {
            headers.remove(CONTENT_ENCODING);
            headers.remove(CONTENT_LENGTH);
            Ok(decoded)
        }
        Err(error) => {
            tracing::warn!("http.response.header.content-encoding" = ?[&encoding], exception.message = %error, "cannot decode exchange answer; forwarding it undecoded");
            if let Ok(encoding) = HeaderValue::from_str(&encoding) {
                headers.insert(CONTENT_ENCODING, encoding);
            }
            Ok(body)
        }
    }
}

/// The encodings of a body as one text, in lower case and without `identity`; at most 64 characters, since the exchange
/// chooses the text.
fn encoding(headers: &HeaderMap) -> String {
    let values = headers.get_all(CONTENT_ENCODING).iter();
    let text: Vec<_> = values
        .map(|value| String::from_utf8_lossy(value.as_bytes()).to_ascii_lowercase())
        .collect();
    let text = text.join(",");
    let encodings: Vec<_> = text
        .split(',')
        .map(str::trim)
        .filter(|encoding| !matches!(*encoding, "" | "identity"))
        .collect();
    let fits = |c: &char| c.is_ascii_graphic() || *c == ' ';
    encodings.join(", ").chars().filter(fits).take(64).collect()
}

/// The whole text of a decoder, or its error.
fn read<E: From<SendError>>(
    mut body: impl Read,
    mut decoded: Collector<impl FnMut(usize) -> Result<(), E>>,
) -> Result<io::Result<Bytes>, E> {
    let mut part = [0; 8192];
    loop {
        match body.read(&mut part) {
            Ok(0) => return Ok(Ok(decoded.finish())),
            Ok(count) => decoded.push(part.get(..count).unwrap_or_default())?,
            Err(error) => return Ok(Err(error)),
        }
    }
}

/// Whether `body` begins with a zlib header. Source: RFC 1950, 2.2.
fn is_zlib(body: &[u8]) -> bool {
    match body {
        [first, second, ..] => {
            first & 0x0f == 8 && (u16::from(*first) << 8 | u16::from(*second)) % 31 == 0
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    use super::*;

    // python3: base64.b64encode(gzip.compress(b'{"code":"200000"}', mtime=0)), zlib.compress(…), zlib.compressobj(wbits=-15).
    const GZIP: &str = "H4sIAAAAAAACA6tWSs5PSVWyUjIyAAGlWgB0XE/lEQAAAA==";
    const ZLIB: &str = "eJyrVkrOT0lVslIyMgABpVoAK/gEeA==";
    const RAW: &str = "q1ZKzk9JVbJSMjIAAaVaAA==";
    const PLAIN: &[u8] = br#"{"code":"200000"}"#;

    fn decoded(encoding: &str, body: &[u8], max: usize) -> Result<(Bytes, String), SendError> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_ENCODING, HeaderValue::from_str(encoding).unwrap());
        let mut counted = 0;
        let body = decode(&mut headers, Bytes::copy_from_slice(body), max, |bytes| {
            counted += bytes;
            Ok(())
        })?;
        let is_decoded =
            headers.get(CONTENT_ENCODING).is_none() && !matches!(encoding, "" | "identity");
        assert!(
            !is_decoded || counted == body.len(),
            "{counted} of {}",
            body.len()
        );
        let left = headers.get(CONTENT_ENCODING);
        let left = left.map(|value| value.to_str().unwrap().to_owned());
        Ok((body, left.unwrap_or_default()))
    }

    fn bytes(text: &str) -> Vec<u8> {
        STANDARD.decode(text).unwrap()
    }

    #[test]
    fn decoded_body_loses_its_content_encoding() {
        for (encoding, body) in [
            ("gzip", bytes(GZIP)),
            ("x-gzip", bytes(GZIP)),
            ("GZIP, identity", bytes(GZIP)),
            ("deflate", bytes(ZLIB)),
            ("deflate", bytes(RAW)),
            ("identity", PLAIN.to_vec()),
            ("", PLAIN.to_vec()),
        ] {
            let (body, left) = decoded(encoding, &body, 17).unwrap();
            assert_eq!((&body[..], left.as_str()), (PLAIN, ""), "{encoding}");
        }
    }

    #[test]
    fn undecodable_body_keeps_its_content_encoding() {
        let gzip = bytes(GZIP);
        let mut torn = gzip.clone();
        torn.truncate(gzip.len() - 6);
        let mut flipped = gzip.clone();
        flipped[12] ^= 0xff;
        for (encoding, body, left) in [
            ("br", &gzip, "br"),
            ("zstd", &gzip, "zstd"),
            ("gzip, br", &gzip, "gzip, br"),
            ("gzip", &torn, "gzip"),
            ("gzip", &flipped, "gzip"),
            ("gzip", &PLAIN.to_vec(), "gzip"),
            ("deflate", &PLAIN.to_vec(), "deflate"),
        ] {
            let came = decoded(encoding, body, 1000).unwrap();
            assert_eq!(
                (&came.0[..], came.1.as_str()),
                (&body[..], left),
                "{encoding}"
            );
        }
        let long = "x".repeat(1000);
        assert_eq!(decoded(&long, PLAIN, 1000).unwrap().1.len(), 64);
    }

    #[test]
    fn size_limit_applies_to_the_decoded_body() {
        for (encoding, body) in [("gzip", GZIP), ("deflate", ZLIB)] {
            let error = decoded(encoding, &bytes(body), 16).unwrap_err();
            assert!(matches!(error, SendError::AnswerTooLarge(16)), "{error:?}");
        }
    }
}
