//! Certificates of clients that are exchanged while they are in use.

use std::{
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

/// What openssl prints.
pub fn openssl(arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new("openssl")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "{arguments:?}: {done:?}");
    done.stdout
}

const KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];

/// Folders with `ca.pem`, `cert.pem` and `key.pem`, and a link `current` to one of them: all three change in one
/// moment, as a Secret's do.
pub struct Certificates {
    folder: tempfile::TempDir,
    /// Has `ca.crt` and `ca.key`.
    ca: String,
}

impl Certificates {
    pub fn of(ca: &str) -> Certificates {
        Certificates { folder: tempfile::tempdir().unwrap(), ca: ca.to_owned() }
    }

    pub fn path(&self, name: &str) -> String {
        self.folder.path().join(name).display().to_string()
    }

    /// One for this name.
    pub fn make(&self, name: &str) {
        let (at, ca) = (self.path(name), &self.ca);
        std::fs::create_dir(&at).unwrap();
        let subject = ["-subj", &format!("/CN={name}"), "-keyout", &format!("{at}/key.pem")];
        let request = openssl(&[&["req"], &KEY[..], &subject].concat(), b"");
        let by = ["-CA", &format!("{ca}/ca.crt"), "-CAkey", &format!("{ca}/ca.key")];
        // What has no extension is of a version of X.509 that rustls does not take.
        let extensions = format!("{at}/extensions");
        std::fs::write(&extensions, "extendedKeyUsage = clientAuth\n").unwrap();
        let out = ["-days", "1", "-extfile", &extensions, "-out", &format!("{at}/cert.pem")];
        openssl(&[&["x509", "-req"], &by[..], &out].concat(), &request);
        self.trust(name, true);
    }

    /// Whether the one of this name trusts the authority, or somebody else.
    pub fn trust(&self, name: &str, is_trusted: bool) {
        let file = self.path(&format!("{name}/ca.pem"));
        if is_trusted {
            std::fs::copy(Path::new(&self.ca).join("ca.crt"), &file).unwrap();
        } else {
            let somebody =
                ["-days", "1", "-subj", "/CN=somebody else", "-keyout", "/dev/null", "-out", &file];
            openssl(&[&["req", "-x509"], &KEY[..], &somebody].concat(), b"");
        }
    }

    pub fn switch_to(&self, name: &str) {
        let next = self.path("next");
        std::os::unix::fs::symlink(self.path(name), &next).unwrap();
        std::fs::rename(next, self.path("current")).unwrap();
    }
}
