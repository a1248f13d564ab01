//! Collects the body of an answer in one buffer.
//!
//! Each part is copied: a part that is kept would keep the whole read buffer of its connection, so an answer in parts of one
//! byte would take thousands of times its size.

use bytes::Bytes;

use super::SendError;

/// A growing body. Its buffer is at most twice as large as the counted bytes, and never larger than expected.
pub(super) struct Collector<A> {
    bytes: Vec<u8>,
    /// The size of the complete body, if it is known; otherwise the largest allowed size.
    expected: usize,
    max_bytes: usize,
    /// Counts the bytes of each part, or refuses them.
    admit: A,
}

impl<A> Collector<A> {
    /// A body of at most `max_bytes`; `announced` is its size, if that is known.
    pub(super) fn new(announced: Option<u64>, max_bytes: usize, admit: A) -> Self {
        let announced = announced.and_then(|bytes| usize::try_from(bytes).ok());
        Self {
            bytes: Vec::new(),
            expected: announced.unwrap_or(max_bytes).min(max_bytes),
            max_bytes,
            admit,
        }
    }

    /// Adds a part.
    ///
    /// # Errors
    /// [`SendError::AnswerTooLarge`], or that `admit` refused the part.
    pub(super) fn push<E>(&mut self, part: &[u8]) -> Result<(), E>
    where
        A: FnMut(usize) -> Result<(), E>,
        E: From<SendError>,
    {
        let length = self.bytes.len() + part.len();
        if length > self.max_bytes {
            return Err(SendError::AnswerTooLarge(self.max_bytes).into());
        }
        (self.admit)(part.len())?;
        let capacity = self.bytes.capacity();
        if length > capacity {
            let capacity = (2 * capacity).min(self.expected).max(length);
            self.bytes.reserve_exact(capacity - self.bytes.len());
        }
        self.bytes.extend_from_slice(part);
        Ok(())
    }

    /// The complete body.
    pub(super) fn finish(self) -> Bytes {
        self.bytes.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffer_is_at_most_twice_the_counted_bytes_for_parts_of_any_size() {
        for part in [1, 7, 1000, 65_536] {
            for announced in [None, Some(300_000)] {
                let mut counted = 0;
                let admit = |bytes| {
                    counted += bytes;
                    Ok::<_, SendError>(())
                };
                let mut body = Collector::new(announced, 1_000_000, admit);
                while body.bytes.len() + part <= 300_000 {
                    body.push(&vec![b'x'; part]).unwrap();
                    let (length, capacity) = (body.bytes.len(), body.bytes.capacity());
                    assert!(capacity <= 2 * length, "{part}: {capacity} for {length}");
                    assert!(announced.is_none() || capacity <= 300_000);
                }
                let body = body.finish();
                assert_eq!(counted, body.len());
                assert!(body.len() + part > 300_000);
            }
        }
    }

    #[test]
    fn part_that_is_too_large_or_refused_is_not_added() {
        let admit = |bytes| {
            if bytes == 3 {
                Err(SendError::WrongAnswer)
            } else {
                Ok(())
            }
        };
        let mut body = Collector::new(None, 4, admit);
        body.push(b"ab").unwrap();
        assert!(matches!(
            body.push(b"cde"),
            Err(SendError::AnswerTooLarge(4))
        ));
        body.push(b"cd").unwrap();
        assert!(matches!(body.push(b"e"), Err(SendError::AnswerTooLarge(4))));
        assert_eq!(body.finish(), "abcd");
        let mut body = Collector::new(Some(4), 4, admit);
        assert!(matches!(body.push(b"abc"), Err(SendError::WrongAnswer)));
        assert_eq!(body.finish(), "");
    }
}
