//! Typed identifiers: a one-letter kind, a dash, and a UUIDv7 (RFC 9562 §5.7), as in `W-0193…`.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use uuid::Uuid;

/// A string that is not an identifier of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not {kind} id: expected {prefix}-<uuid>")]
pub struct ParseIdError {
    text: String,
    kind: &'static str,
    prefix: char,
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $prefix:literal, $kind:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Uuid);

        impl $name {
            /// Makes a UUIDv7 from the current time and random bits.
            #[must_use]
            pub fn generate() -> Self {
                Self(Uuid::now_v7())
            }

            /// The identifier without its prefix.
            #[must_use]
            pub const fn uuid(&self) -> Uuid {
                self.0
            }
        }

        impl From<Uuid> for $name {
            fn from(uuid: Uuid) -> Self {
                Self(uuid)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}-{}", $prefix, self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;

            fn from_str(text: &str) -> Result<Self, Self::Err> {
                let error = || ParseIdError { text: text.chars().take(64).collect(), kind: $kind, prefix: $prefix };
                let bare = text.strip_prefix(concat!($prefix, "-")).unwrap_or(text);
                // `Uuid` would also accept braces, URNs and the form without hyphens.
                if bare.len() != 36 {
                    return Err(error());
                }
                bare.parse().map(Self).map_err(|_| error())
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
                text.parse().map_err(de::Error::custom)
            }
        }

        impl utoipa::PartialSchema for $name {
            fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
                String::schema()
            }
        }

        impl utoipa::ToSchema for $name {}
    };
}

id!(
    /// A weaver: `W-<uuidv7>`. Its pod is named `weaver-<uuid>`.
    WeaverId, 'W', "a weaver"
);
id!(
    /// An organisation: `O-<uuidv7>`.
    OrgId, 'O', "an organisation"
);
id!(
    /// A user: `U-<uuidv7>`.
    UserId, 'U', "a user"
);

impl WeaverId {
    /// The name of the weaver's pod: derived from the id, so that creating it twice makes one pod.
    #[must_use]
    pub fn pod_name(&self) -> String {
        format!("weaver-{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_with_and_without_its_prefix() {
        let id = WeaverId::generate();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert_eq!(id.uuid().to_string().parse(), Ok(id));
        assert_eq!(serde_json::to_string(&id).expect("serialises"), format!("\"{id}\""));
    }

    #[test]
    fn ids_of_another_kind_and_other_uuid_forms_are_refused() {
        let uuid = Uuid::now_v7();
        for text in [format!("O-{uuid}"), format!("{{{uuid}}}"), uuid.simple().to_string(), String::new()] {
            assert!(text.parse::<WeaverId>().is_err(), "{text}");
        }
    }
}
