//! The namespace that a chain of pages belongs to, and the key of a user within it.
//!
//! Invariant: both are digests of length-prefixed or fixed-size parts, so no two different inputs
//! are encoded alike. They are not secret and carry no request content; the secret is the key of
//! the chain hash.

use std::fmt;

/// What a chain of pages belongs to: the digest of the model, and a salt of the tenant.
///
/// It goes into every link of the chain and is compared on every hit, so two models or two tenants
/// never share a page, however equal their contexts.
#[derive(Copy, Clone, Eq, PartialEq, Hash)]
pub struct Namespace([u8; 32]);

impl Namespace {
    /// The namespace of one tenant's use of one model. `model_digest` must cover everything that
    /// K/V depend on besides the context words: weights, configuration, number format.
    pub fn new(model_digest: &[u8], tenant_salt: &[u8]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("beamline kv-cache 1 namespace");
        for part in [model_digest, tenant_salt] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The part of this namespace that only one exact context can address. For models where every
    /// position's KV depends on the whole context, see
    /// [`ReuseClass::Exact`](crate::ReuseClass::Exact).
    pub fn narrowed_to(&self, words: &[u32]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("beamline kv-cache 1 exact context");
        hasher.update(&self.0);
        for word in words {
            hasher.update(&word.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }

    pub(crate) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The namespace with these bytes, as [`Namespace::as_bytes`] gave them.
    pub(crate) fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Namespace({:02x}{:02x}{:02x}{:02x}..)", self.0[0], self.0[1], self.0[2], self.0[3])
    }
}

/// A user within a namespace.
///
/// It is only the key to a hint. Two users with one key would share a session, but never a page
/// that they may not share.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Debug)]
pub struct SessionKey(pub u128);

impl SessionKey {
    /// The key of user `user_id` in namespace `ns`.
    pub fn new(ns: &Namespace, user_id: &str) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("beamline kv-cache 1 session");
        hasher.update(&ns.0);
        hasher.update(user_id.as_bytes());
        let mut half = [0; 16];
        half.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(u128::from_le_bytes(half))
    }
}

#[cfg(test)]
mod tests {
    use super::{Namespace, SessionKey};

    #[test]
    fn parts_cannot_run_into_each_other() {
        let namespace = Namespace::new(b"ab", b"c");
        assert_eq!(namespace, Namespace::new(b"ab", b"c"));
        for other in [Namespace::new(b"a", b"bc"), Namespace::new(b"abc", b""), Namespace::new(b"c", b"ab")] {
            assert_ne!(namespace, other);
        }
        assert_ne!(namespace.narrowed_to(&[1, 2]), namespace.narrowed_to(&[1, 2, 0]));
        assert_ne!(namespace.narrowed_to(&[]), namespace);
    }

    #[test]
    fn a_user_of_two_namespaces_has_two_sessions() {
        let (a, b) = (Namespace::new(b"m", b"a"), Namespace::new(b"m", b"b"));
        assert_ne!(SessionKey::new(&a, "u1"), SessionKey::new(&b, "u1"));
        assert_ne!(SessionKey::new(&a, "u1"), SessionKey::new(&a, "u2"));
    }
}
