//! Who waits for a long message is not woken for each piece of it: the server sends 8 KiB at a time, and to be woken costs
//! more than to receive them.

use std::os::fd::OwnedFd;

use tokio::net::TcpStream;

/// A piece that is worth it. The kernel makes that much room, and more, or takes less for enough.
const WORTH: usize = 256 << 10;

/// The socket of a connection whose end is not elsewhere, as in TLS.
#[derive(Debug)]
pub(super) struct Patience {
    socket: Option<OwnedFd>,
    /// What is waited for now, in bytes.
    bytes: usize,
}

impl Patience {
    pub const NONE: Patience = Patience { socket: None, bytes: 1 };

    #[cfg(target_os = "linux")]
    pub fn of(socket: &TcpStream) -> Patience {
        use std::os::fd::AsFd as _;
        Patience { socket: socket.as_fd().try_clone_to_owned().ok(), bytes: 1 }
    }

    #[cfg(not(target_os = "linux"))]
    pub fn of(_: &TcpStream) -> Patience {
        Patience::NONE
    }

    /// So many bytes come for certain.
    pub fn wait_for(&mut self, bytes: usize) {
        let bytes = bytes.clamp(1, WORTH);
        if let Some(socket) = &self.socket
            && self.bytes != bytes
        {
            self.bytes = bytes;
            set(socket, bytes);
        }
    }
}

/// SO_RCVLOWAT (socket(7)).
#[cfg(target_os = "linux")]
#[expect(unsafe_code, reason = "no crate in use has a safe form of it")]
fn set(socket: &OwnedFd, bytes: usize) {
    use std::os::fd::AsRawFd as _;
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    // SAFETY: the descriptor is open for as long as it is borrowed, and the option is an int, which the kernel reads. Where
    // it refuses, the reader is woken as before.
    unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        );
    }
}

#[cfg(not(target_os = "linux"))]
fn set(_: &OwnedFd, _: usize) {}
