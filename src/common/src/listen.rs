//! Listening on one address of both families.

use std::net::{Ipv4Addr, SocketAddr};

use tokio::net::TcpListener;

/// Listens on `address`. `[::]` takes IPv4, too (unless the machine sets `net.ipv6.bindv6only`), and where there is no IPv6 means `0.0.0.0`: pods of
/// clusters of either family are reached on one and the same default.
///
/// # Errors
/// If the address is taken or not this machine's.
pub async fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) if is_any_v6(address) && lacks_v6(&error) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await,
        bound => bound,
    }
}

fn is_any_v6(address: SocketAddr) -> bool {
    address.is_ipv6() && address.ip().is_unspecified()
}

/// The kernel was built without IPv6 ("address family not supported", which the library has no name for), or it is turned off.
fn lacks_v6(error: &std::io::Error) -> bool {
    !matches!(error.kind(), std::io::ErrorKind::AddrInUse | std::io::ErrorKind::PermissionDenied)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv6Addr;
    use tokio::net::TcpStream;

    #[tokio::test]
    async fn the_default_address_is_reached_by_both_families() {
        let listener = listen((Ipv6Addr::UNSPECIFIED, 0).into()).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
        // A machine without IPv6 has no loopback address of that family either.
        if TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).await.is_ok() {
            TcpStream::connect((Ipv6Addr::LOCALHOST, port)).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_taken_port_is_an_error_and_not_a_reason_for_the_other_family() {
        let taken = listen((Ipv6Addr::UNSPECIFIED, 0).into()).await.unwrap();
        let address = taken.local_addr().unwrap();
        assert_eq!(listen(address).await.unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
    }

    #[test]
    fn only_the_wildcard_has_another_family_to_fall_back_to() {
        for (address, any) in [("[::]:9400", true), ("[::1]:9400", false), ("0.0.0.0:9400", false)] {
            assert_eq!(is_any_v6(address.parse().unwrap()), any, "{address}");
        }
        for (kind, lacks) in [
            (std::io::ErrorKind::AddrNotAvailable, true),
            (std::io::ErrorKind::Unsupported, true),
            (std::io::ErrorKind::AddrInUse, false),
            (std::io::ErrorKind::PermissionDenied, false),
        ] {
            assert_eq!(lacks_v6(&kind.into()), lacks, "{kind}");
        }
    }
}
