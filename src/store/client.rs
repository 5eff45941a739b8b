//! The client of a store, made anew when the files that its options name have changed: keys that are rotated are
//! taken up without a restart. Credentials of the platform are `object_store`'s own to renew.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use tracing::{info, warn};

use super::{StoreError, checked::Objects, open::Options};

/// The files are small, and looked at before a request.
const LOOK_EVERY: Duration = Duration::from_secs(1);

type Read = Box<dyn Fn() -> Result<Options, StoreError> + Send + Sync>;
type Connect = Box<dyn Fn(&Options) -> Result<Objects, StoreError> + Send + Sync>;

pub(super) struct Client {
    read: Read,
    connect: Connect,
    current: Mutex<Current>,
}

struct Current {
    objects: Objects,
    /// What it was made of, or would have been, had that been good.
    options: Options,
    looked: Instant,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

impl Client {
    /// `objects` is what `connect` made of `options`, which `read` gave.
    pub fn new(objects: Objects, options: Options, read: Read, connect: Connect) -> Client {
        let current = Mutex::new(Current { objects, options, looked: Instant::now() });
        Client { read, connect, current }
    }

    /// As the files are now. Options that are no good leave what there is.
    pub fn objects(&self) -> Objects {
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.looked.elapsed() >= LOOK_EVERY {
            current.looked = Instant::now();
            // A file that is gone is one that is being replaced.
            if let Ok(options) = (self.read)()
                && options != current.options
            {
                match (self.connect)(&options) {
                    Ok(objects) => {
                        info!("the options of the object store have changed and are taken up");
                        current.objects = objects;
                    }
                    Err(error) => {
                        warn!(%error, "the options of the object store have changed and cannot be used");
                    }
                }
                current.options = options;
            }
        }
        current.objects.clone()
    }
}
