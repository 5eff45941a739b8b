//! What the spool's folder is on: an answer of 202 holds for as long as that does.

use std::path::Path;

/// Why what is kept in this folder may not outlive the process, or the machine, as far as can be told. Nothing
/// is said of a folder that is not there.
pub fn passing(folder: &Path) -> Option<&'static str> {
    // As proc(5) has it.
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    passing_by(&mounts, &folder.canonicalize().ok()?)
}

fn passing_by(mounts: &str, folder: &Path) -> Option<&'static str> {
    let mount = mounts
        .lines()
        .filter_map(Mount::read)
        .filter(|mount| folder.starts_with(&mount.at))
        // Of two at one place, the later one is what is seen.
        .max_by_key(|mount| Path::new(&mount.at).components().count())?;
    let is_empty_dir =
        mount.root.contains("kubernetes.io~empty-dir") || mount.at.contains("kubernetes.io~empty-dir");
    match mount.kind {
        _ if is_empty_dir => Some(
            "it is an emptyDir, which goes with its pod: an answer of 202 holds only that long. Use a persistent volume",
        ),
        "tmpfs" | "ramfs" => Some(
            "it is memory, which a restart of the machine or pod clears: an answer of 202 holds only that long",
        ),
        "overlay" => Some(
            "it is the container's own layer, which goes with the container: an answer of 202 holds only that long. Mount a volume",
        ),
        "nfs" | "nfs4" | "cifs" | "9p" => Some(
            "it is on the network, where locks and fsync cannot be relied on: use a disk of this machine",
        ),
        _ => None,
    }
}

struct Mount<'a> {
    root: &'a str,
    at: String,
    kind: &'a str,
}

impl<'a> Mount<'a> {
    /// `36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw`
    fn read(line: &'a str) -> Option<Mount<'a>> {
        let (place, device) = line.split_once(" - ")?;
        let mut fields = place.split(' ').skip(3);
        let (root, at) = (fields.next()?, fields.next()?);
        let at = at.replace("\\040", " ");
        Some(Mount { root, at, kind: device.split(' ').next()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
1 0 0:1 / / rw - overlay overlay rw
2 1 0:2 / /proc rw - proc proc rw
3 1 8:1 / /var/lib rw master:1 - ext4 /dev/sda1 rw
4 1 8:1 /pods/1/volumes/kubernetes.io~empty-dir/spool /spool rw - ext4 /dev/sda1 rw
5 1 0:5 / /dev/shm rw - tmpfs tmpfs rw
6 1 0:6 / /net\\040share rw - nfs4 host:/x rw
";

    #[test]
    fn what_passes_with_the_pod_is_told() {
        for (folder, said) in [
            ("/srv/spool", Some("the container's own layer")),
            ("/var/lib/whippet", None),
            ("/var/library", Some("the container's own layer")),
            ("/spool", Some("an emptyDir")),
            ("/spool/a/b", Some("an emptyDir")),
            ("/dev/shm/x", Some("memory")),
            ("/net share/x", Some("on the network")),
        ] {
            let found = passing_by(MOUNTS, Path::new(folder));
            assert_eq!(found.is_some(), said.is_some(), "{folder}: {found:?}");
            assert!(found.unwrap_or_default().contains(said.unwrap_or_default()), "{folder}: {found:?}");
        }
        assert_eq!(passing_by("", Path::new("/x")), None);
    }
}
