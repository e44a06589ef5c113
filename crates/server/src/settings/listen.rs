//! The listening address, as people write it: `8080`, `:8080`, `localhost:8080`, `0.0.0.0:8080`,
//! `[::]:8080`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer, Visitor};

/// An address and a port. A port alone means this machine only: opening a service to a network
/// should be explicit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListenAddress(pub SocketAddr);

/// The text is not an address to listen on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not an address to listen on: write 127.0.0.1:8080 or 8080 for this machine only, 0.0.0.0:8080 for \
     every network"
)]
pub struct BadListenAddress(String);

impl FromStr for ListenAddress {
    type Err = BadListenAddress;

    fn from_str(text: &str) -> Result<Self, BadListenAddress> {
        let bad = || BadListenAddress(text.to_owned());
        let trimmed = text.trim();
        if let Ok(address) = trimmed.parse() {
            return Ok(Self(address));
        }
        let (host, port) = trimmed.rsplit_once(':').unwrap_or(("", trimmed));
        let port: u16 = port.parse().map_err(|_| bad())?;
        let ip: IpAddr = match host {
            "" | "localhost" => Ipv4Addr::LOCALHOST.into(),
            "*" => Ipv4Addr::UNSPECIFIED.into(),
            _ => return Err(bad()),
        };
        Ok(Self(SocketAddr::new(ip, port)))
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for ListenAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AddressVisitor;

        impl Visitor<'_> for AddressVisitor {
            type Value = ListenAddress;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address such as \"127.0.0.1:8080\", or a port")
            }

            fn visit_i64<E: de::Error>(self, port: i64) -> Result<ListenAddress, E> {
                port.to_string().parse().map_err(E::custom)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ListenAddress, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(AddressVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_people_write_them() {
        for (text, address) in [
            ("8080", "127.0.0.1:8080"),
            (":8080", "127.0.0.1:8080"),
            ("localhost:9000", "127.0.0.1:9000"),
            (" 127.0.0.1:0 ", "127.0.0.1:0"),
            ("*:80", "0.0.0.0:80"),
            ("0.0.0.0:80", "0.0.0.0:80"),
            ("[::1]:80", "[::1]:80"),
        ] {
            assert_eq!(text.parse::<ListenAddress>().unwrap().to_string(), address, "{text}");
        }
        for text in ["", "0.0.0.0", "shop.example:80", "70000", "::1:80", "http://127.0.0.1:80", "8080:"] {
            let error = text.parse::<ListenAddress>().unwrap_err().to_string();
            assert!(error.contains("write 127.0.0.1:8080"), "{error}");
        }
    }

    #[test]
    fn the_file_may_give_a_port() {
        #[derive(serde::Deserialize)]
        struct File {
            listen: ListenAddress,
        }
        let read = |text: &str| toml::from_str::<File>(text).map(|file| file.listen.to_string());
        assert_eq!(read("listen = 8080").unwrap(), "127.0.0.1:8080");
        assert_eq!(read("listen = '0.0.0.0:81'").unwrap(), "0.0.0.0:81");
        assert!(read("listen = 80800").unwrap_err().to_string().contains("write 127.0.0.1:8080"));
    }
}
