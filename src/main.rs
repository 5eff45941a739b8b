//! Arguments, configuration, run, exit code. Everything else is in the library.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    set_up_memory();
    whippet::cli::Cli::parse().run()
}

/// How glibc keeps what is freed (mallopt(3)). By default it raises the first limit with each larger block that is freed, up
/// to 32 MiB, and keeps such blocks in each of its arenas: then a few payloads of 5 MB leave as many megabytes behind as
/// the whole window has. And with the first limit fixed, the second is 128 KiB: every payload of 1 MiB would be given back to
/// the system and asked for again, which took 40 % of the processor's time.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "the calls that have no safe form")]
fn set_up_memory() {
    const SETTINGS: [(libc::c_int, libc::c_int); 3] = [
        // Larger blocks go back to the system when they are freed. Above the buffers that are made all the time.
        (libc::M_MMAP_THRESHOLD, 4 << 20),
        // Free memory at the end of an arena, which is kept.
        (libc::M_TRIM_THRESHOLD, 16 << 20),
        // Each arena has such an end.
        (libc::M_ARENA_MAX, 2),
    ];
    for (parameter, value) in SETTINGS {
        // SAFETY: it changes a number of the allocator, before there is another thread. Where it refuses, memory is as before.
        unsafe { libc::mallopt(parameter, value) };
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn set_up_memory() {}
