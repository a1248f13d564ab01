//! What admins forbid: in force at once, whatever Vault does, and for good.
