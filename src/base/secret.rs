//! What a key is made of. Wiped on drop; shows nothing in `Debug`; no copy, no comparison, no serialization.

use std::alloc::System;
use std::fmt;
use std::hint::black_box;

use zeroize::Zeroizing;
use zeroizing_alloc::ZeroAlloc;

/// Overwrites all memory as it is freed. Libraries copy what they are given (JSON, HTTP, TLS) and free it as it stands, and
/// what is freed can stay readable for days.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);

/// How much of the stack is overwritten, in parts: more than HMAC-SHA256 uses. Without optimisation every value has a
/// place of its own.
const STACK_PARTS: usize = if cfg!(debug_assertions) { 64 } else { 4 };

/// Bytes of one part: few enough that `memset` does not write them with slow string instructions.
const STACK_PART_BYTES: usize = 1024;

/// Runs `work`, then overwrites the stack that it has used: the compiler copies values as it likes, and no drop wipes
/// those copies. What `work` returns must not be secret itself.
pub(crate) fn with_clean_stack<T>(work: impl FnOnce() -> T) -> T {
    let result = below(work);
    overwrite(STACK_PARTS);
    result
}

#[inline(never)]
fn below<T>(work: impl FnOnce() -> T) -> T {
    work()
}

#[inline(never)]
fn overwrite(parts: usize) {
    let mut part = [0_u8; STACK_PART_BYTES];
    black_box(&mut part);
    if parts > 1 {
        overwrite(parts - 1);
    }
    // Used once more, so that this is no tail call that reuses the frame.
    black_box(&mut part);
}

/// Makes a type for secret text.
macro_rules! secret {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        pub struct $name(Zeroizing<Box<[u8]>>);

        impl $name {
            /// Takes the text over; the caller's copy is gone.
            pub fn new(text: Zeroizing<String>) -> Self {
                // `as_bytes().into()` allocates exactly; the argument is wiped when it drops.
                Self(Zeroizing::new(text.as_bytes().into()))
            }

            /// Lends the bytes: to `kucoin/sign.rs`, and when an admin registers a key to `vault/write.rs` and
            /// to the call that tests it.
            pub(crate) fn expose(&self) -> &[u8] {
                &self.0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), "(redacted)"))
            }
        }
    };
}

secret!(
    /// HMAC key of one KuCoin API key.
    ApiSecret
);
secret!(
    /// Passphrase of one KuCoin API key, as the admin chose it.
    Passphrase
);
secret!(
    /// HMAC key of a KuCoin partner (broker rebate programme).
    PartnerKey
);

/// The values of one KuCoin API key, as an admin gives them.
pub struct KeyValues {
    /// Id of the key. Not as secret as the others, and wiped all the same.
    pub api_key: Zeroizing<String>,
    /// Its secret.
    pub api_secret: ApiSecret,
    /// Its passphrase.
    pub passphrase: Passphrase,
    /// The partner's key, for an account that has a partner.
    pub partner_key: Option<PartnerKey>,
}

impl fmt::Debug for KeyValues {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyValues(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_shows_no_secret() {
        let text = || Zeroizing::new("fake-secret".to_owned());
        assert_eq!(
            format!("{:?}", ApiSecret::new(text())),
            "ApiSecret(redacted)"
        );
        assert_eq!(
            format!("{:?}", Passphrase::new(text())),
            "Passphrase(redacted)"
        );
        assert_eq!(
            format!("{:?}", PartnerKey::new(text())),
            "PartnerKey(redacted)"
        );
    }
}
