//! The gRPC codec of both listeners: prost's, with buffers sized for an order.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// Initial bytes of a buffer; it grows as needed. The library's 8 KiB are 20 times the size of an order, and every buffer
/// is wiped when it is freed.
const BUFFER_BYTES: usize = 1024;

/// Bytes from which a stream's buffer is sent; the library's default. This API has no streams.
const YIELD_THRESHOLD: usize = 32 * 1024;

/// Decodes `Decode` and encodes `Encode`.
#[derive(Debug)]
pub(crate) struct SmallBuffers<Encode, Decode>(PhantomData<(Encode, Decode)>);

impl<Encode, Decode> Default for SmallBuffers<Encode, Decode> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<Encode, Decode> Codec for SmallBuffers<Encode, Decode>
where
    Encode: Message + Send + 'static,
    Decode: Message + Default + Send + 'static,
{
    type Encode = Encode;
    type Decode = Decode;
    type Encoder = ProstEncoder<Encode>;
    type Decoder = ProstDecoder<Decode>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(BUFFER_BYTES, YIELD_THRESHOLD))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(BUFFER_BYTES, YIELD_THRESHOLD))
    }
}
