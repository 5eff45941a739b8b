//! Arguments, configuration, run, exit code. Everything else is in the library.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    give_large_blocks_back();
    whippet::cli::Cli::parse().run()
}

/// Has glibc give blocks of large payloads back to the system when they are freed. Unless told, it raises this limit
/// with each larger block that is freed, up to 32 MiB (mallopt(3)), and keeps such blocks in each of its arenas: then a
/// few payloads of 5 MB leave as many megabytes behind as the whole window has.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "the one call that has no safe form")]
fn give_large_blocks_back() {
    // Above the buffers that are made all the time, for which the system would be asked too often.
    const LARGE: libc::c_int = 4 << 20;
    // SAFETY: it changes a number of the allocator, before there is another thread. Where it refuses, memory is as before.
    unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn give_large_blocks_back() {}
