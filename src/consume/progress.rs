//! Which offset of a partition is safe to commit.

use std::collections::BTreeSet;

/// What has been read of a partition, and what of that is still open: handed over and not done, an
/// error that nobody has looked at, or chunks that wait for more.
#[derive(Debug, Default)]
pub struct Progress {
    next: Option<i64>,
    open: BTreeSet<i64>,
}

impl Progress {
    /// A record has been read.
    pub fn read(&mut self, offset: i64) {
        self.next = self.next.max(Some(offset + 1));
    }

    /// Something that begins at this offset is open.
    pub fn open(&mut self, first: i64) {
        self.open.insert(first);
    }

    /// It no longer is.
    pub fn close(&mut self, first: i64) {
        self.open.remove(&first);
    }

    /// Who starts reading here misses nothing that is open.
    pub fn safe(&self) -> Option<i64> {
        self.open.first().copied().or(self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_that_is_open_is_safe_and_else_the_next_offset() {
        let mut progress = Progress::default();
        assert_eq!(progress.safe(), None);
        for offset in [10, 11, 15] {
            progress.read(offset);
        }
        progress.open(11);
        progress.open(15);
        assert_eq!(progress.safe(), Some(11));
        progress.close(15);
        assert_eq!(progress.safe(), Some(11));
        progress.close(11);
        assert_eq!(progress.safe(), Some(16));
    }
}
