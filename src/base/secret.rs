//! Secret values of keys. Wiped on drop and redacted in `Debug`; they cannot be copied, compared or serialized.

use std::alloc::System;
use std::fmt;
use std::hint::black_box;

use zeroize::Zeroizing;
use zeroizing_alloc::ZeroAlloc;

/// Overwrites all memory when it is freed. Libraries (JSON, HTTP, TLS) copy secrets and free the copies without wiping them,
/// and freed memory can stay readable for days.
#[global_allocator]
static ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);

/// How much of the stack to overwrite, in parts: more than HMAC-SHA256 uses. Builds without optimisation use more, because
/// every value has its own stack slot.
const STACK_PARTS: usize = if cfg!(debug_assertions) { 64 } else { 4 };

/// Bytes of one part: small enough that `memset` does not use slow string instructions.
const STACK_PART_BYTES: usize = 1024;

/// Runs `work`, then overwrites the stack that it used: the compiler may copy values there, and no drop wipes these copies.
/// The return value must not be secret.
pub(crate) fn with_clean_stack<T>(work: impl FnOnce() -> T) -> T {
    let result = in_own_frame(work);
    overwrite(STACK_PARTS);
    result
}

#[inline(never)]
fn in_own_frame<T>(work: impl FnOnce() -> T) -> T {
    work()
}

#[inline(never)]
fn overwrite(parts: usize) {
    let mut part = [0_u8; STACK_PART_BYTES];
    black_box(&mut part);
    if parts > 1 {
        overwrite(parts - 1);
    }
    // A use after the call prevents a tail call, which would reuse the frame.
    black_box(&mut part);
}

/// Defines a type for secret text.
macro_rules! secret {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        pub struct $name(Zeroizing<Box<[u8]>>);

        impl $name {
            /// Stores the text; the caller's copy is wiped.
            pub fn new(text: Zeroizing<String>) -> Self {
                // `as_bytes().into()` allocates exactly this length; the argument is wiped when it is dropped.
                Self(Zeroizing::new(text.as_bytes().into()))
            }

            /// Borrows the bytes: for `kucoin/sign.rs`, and when an admin registers a key, for `vault/write.rs` and the call
            /// that tests it.
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

/// The values of one KuCoin API key, as entered by an admin.
pub struct KeyValues {
    /// Id of the key. Less secret than the other values, but also wiped.
    pub api_key: Zeroizing<String>,
    /// API secret.
    pub api_secret: ApiSecret,
    /// Passphrase.
    pub passphrase: Passphrase,
    /// Partner key, if the account has a partner.
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
