//! The directory of the disk tier: who uses it, its secret, and a pool of files for every version.
//!
//! ```text
//! DIR/lock                    held by the server that uses the directory
//! DIR/key                     the format and the secret of the checksums, for nobody else's eyes
//! DIR/<digits>.kv/index       what the slots of a version hold
//! DIR/<digits>.kv/pages       the slots
//! ```
//!
//! A pool belongs to everything that keys and values depend on besides tenant and history: the digest of
//! the checkpoint, the format of its weights, the device, the page, and the build of the server. A
//! version that is unloaded takes its pool with it, and a start deletes the pools of versions that are
//! not loaded.
//!
//! Invariants: one server has the directory; one version has a pool; the server writes only into a
//! directory that is its own.

use std::collections::HashSet;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use beamline_kv_cache::HostTier;
use beamline_kv_cache::disk::{DiskConfig, DiskThreads, DiskTier, Opened, SlotFiles, SlotLayout, Storage};
use sha2::{Digest, Sha256};
use tracing::{error, info, warn};

use crate::settings::{ByteSize, DiskSettings};

/// To be raised whenever what a page holds changes in any bit, for equal weights and words.
const CONTENTS: u32 = 1;
/// What the key begins with: the format of the directory, and its version.
const FORMAT: &str = "beamline kv-disk";
const VERSION: u32 = 1;
const KEY: &str = "key";
const LOCK: &str = "lock";
const POOL: &str = ".kv";
/// Digits of the name of a pool.
const NAME_DIGITS: usize = 32;

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// Somebody else has it.
    #[error(
        "kv-disk {}: another server uses this directory. Stop that server, or give each a directory of its own",
        .0.display()
    )]
    InUse(PathBuf),
    /// It holds something else.
    #[error("kv-disk {}: the directory holds {found:?} and no key of beamline's. Give a directory of its own", path.display())]
    NotOurs {
        /// Path of the directory.
        path: PathBuf,
        /// A file in it.
        found: String,
    },
    /// It is too small.
    #[error("kv-disk {}: kv-disk-size is {}, but there is room for {}; give less", path.display(), ByteSize(*wanted), ByteSize(*room))]
    Full {
        /// Path of the directory.
        path: PathBuf,
        /// What may be taken.
        wanted: usize,
        /// What can be.
        room: usize,
    },
    /// The same version is served under another name.
    #[error("kv-disk {}: another version with the same weights uses the pages", .0.display())]
    PoolInUse(PathBuf),
    /// The system refuses.
    #[error("kv-disk {}: cannot {action}: {source}", path.display())]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// A directory that this process alone uses.
#[derive(Debug)]
pub struct KvDisk {
    path: PathBuf,
    settings: DiskSettings,
    secret: [u8; 32],
    /// Locked for as long as anybody has a file of the directory open.
    lock: Arc<File>,
    /// Pools in use.
    claimed: Mutex<HashSet<String>>,
}

/// The files of one version. They stay when this is dropped.
#[derive(Debug)]
pub struct Pool {
    disk: Arc<KvDisk>,
    name: String,
    identity: String,
}

/// A file of a pool, which keeps the directory locked.
struct PoolFile {
    file: File,
    _lock: Arc<File>,
}

impl KvDisk {
    /// Takes the directory, and makes it if there is none.
    ///
    /// # Errors
    ///
    /// When another server has it, it holds something else, or is too small.
    pub fn open(settings: &DiskSettings) -> Result<Arc<Self>, DiskError> {
        let path = &settings.directory;
        DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(on(path, "make the directory"))?;
        let path = path.canonicalize().map_err(on(path, "resolve the path"))?;
        check_contents(&path)?;
        let lock_path = path.join(LOCK);
        let lock = private().create(true).truncate(false).open(&lock_path);
        let lock = lock.map_err(on(&lock_path, "open the lock"))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(DiskError::InUse(path)),
            Err(TryLockError::Error(source)) => return Err(on(&lock_path, "lock")(source)),
        }
        let secret = secret(&path)?;
        let disk = Self {
            path,
            settings: settings.clone(),
            secret,
            lock: Arc::new(lock),
            claimed: Mutex::default(),
        };
        disk.check_room(disk.pools().iter().map(|pool| taken(pool)).sum())?;
        Ok(Arc::new(disk))
    }

    /// The secret that contexts are filed by. It must be the same after a restart.
    pub fn secret(&self) -> [u8; 32] {
        self.secret
    }

    /// The files of a version, `identity` being all that its pages depend on besides tenants and histories.
    ///
    /// # Errors
    ///
    /// When they are in use, or there is no room for them.
    pub fn pool(self: &Arc<Self>, identity: &str) -> Result<Pool, DiskError> {
        let digest = Sha256::digest(identity.as_bytes());
        let mut name: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        name.truncate(NAME_DIGITS);
        let path = self.path_of(&name);
        self.check_room(taken(&path))?;
        if !self.claimed().insert(name.clone()) {
            return Err(DiskError::PoolInUse(path));
        }
        Ok(Pool { disk: Arc::clone(self), name, identity: identity.to_owned() })
    }

    /// Deletes the pools that no version uses.
    pub fn sweep(&self) {
        let claimed = self.claimed().clone();
        for path in self.pools() {
            let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            if !claimed.contains(name.trim_end_matches(POOL)) {
                info!(path = %path.display(), "deleting KV pages of a version that is not loaded");
                delete(&path);
            }
        }
    }

    fn path_of(&self, pool: &str) -> PathBuf {
        self.path.join(format!("{pool}{POOL}"))
    }

    /// Directories of pools.
    fn pools(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(&self.path) else { return Vec::new() };
        entries.flatten().map(|entry| entry.path()).filter(|path| is_pool(path)).collect()
    }

    /// Checks that one more pool fits, of which this number of bytes is there already.
    fn check_room(&self, there: u64) -> Result<(), DiskError> {
        let stat = rustix::fs::statvfs(&self.path)
            .map_err(|error| on(&self.path, "ask how much room there is")(error.into()))?;
        let room = stat.f_bavail.saturating_mul(stat.f_frsize).saturating_add(there);
        let (wanted, room) = (self.settings.size.0, usize::try_from(room).unwrap_or(usize::MAX));
        if wanted > room {
            return Err(DiskError::Full { path: self.path.clone(), wanted, room });
        }
        Ok(())
    }

    fn claimed(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.claimed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pool {
    /// A tier over the files, behind one in memory if there is one.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn tier(
        &self,
        memory: Option<Box<dyn HostTier>>,
        layout: SlotLayout,
        buffer_bytes: usize,
    ) -> Result<DiskTier, DiskError> {
        let path = self.path();
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map_err(on(&path, "make the directory"))?;
        let open = |name: &str| {
            let path = path.join(name);
            let file = private().read(true).create(true).truncate(false).open(&path);
            let file = file.map_err(on(&path, "open the file"))?;
            Ok(PoolFile { file, _lock: Arc::clone(&self.disk.lock) })
        };
        let DiskSettings { size, ttl, wait, .. } = self.disk.settings;
        let config = DiskConfig {
            buffer_bytes,
            time_to_live: ttl,
            patience: wait,
            on_failure: {
                let path = path.clone();
                Box::new(move |error| {
                    error!(path = %path.display(), %error, "the disk for KV pages failed: it is not used until the next start");
                })
            },
        };
        let (index, pages) = (open("index")?, open("pages")?);
        let (files, opened) =
            SlotFiles::open(index, pages, layout, &self.disk.secret, self.identity.as_bytes())
                .map_err(on(&path, "read the index"))?;
        if let Opened::Replaced(why) = opened {
            warn!(path = %path.display(), why, "KV pages on disk cannot be used and were deleted");
        }
        let slots = layout.slots_in(size.0 as u64);
        DiskTier::new(memory, files, slots, config, DiskThreads::start).map_err(on(&path, "read the index"))
    }

    /// Deletes the files.
    pub fn delete(self) {
        delete(&self.path());
    }

    fn path(&self) -> PathBuf {
        self.disk.path_of(&self.name)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.disk.claimed().remove(&self.name);
    }
}

impl Storage for PoolFile {
    fn len(&self) -> io::Result<u64> {
        Storage::len(&self.file)
    }

    fn read_at(&self, at: u64, to: &mut [u8]) -> io::Result<()> {
        self.file.read_at(at, to)
    }

    fn write_at(&self, at: u64, from: &[u8]) -> io::Result<()> {
        self.file.write_at(at, from)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
}

/// All that pages of a version depend on besides tenants and histories.
pub fn identity(model: &str, device: &str, page_size: usize, layout: SlotLayout) -> String {
    let SlotLayout { page_bytes, .. } = layout;
    let build = env!("CARGO_PKG_VERSION");
    format!(
        "{model}; {device}; {page_size} positions in {page_bytes} bytes; contents {CONTENTS}; build {build}"
    )
}

/// Files that nobody else may read.
fn private() -> OpenOptions {
    let mut options = File::options();
    options.write(true).mode(0o600);
    options
}

/// Refuses a directory that was somebody else's before.
fn check_contents(path: &Path) -> Result<(), DiskError> {
    if path.join(KEY).exists() {
        return Ok(());
    }
    for entry in fs::read_dir(path).map_err(on(path, "list the directory"))? {
        let name = entry.map_err(on(path, "list the directory"))?.file_name();
        let found = name.to_string_lossy().into_owned();
        // What a first start that was killed has left.
        if found != LOCK && found != fresh(KEY) {
            return Err(DiskError::NotOurs { path: path.to_owned(), found });
        }
    }
    Ok(())
}

/// The secret of the directory; a new one, and no pages, if it has none that can be read.
fn secret(path: &Path) -> Result<[u8; 32], DiskError> {
    let file = path.join(KEY);
    match fs::read_to_string(&file) {
        Ok(text) => match parse(&text) {
            Ok(secret) => {
                // A copy may have lost its mode.
                let own = fs::set_permissions(&file, Permissions::from_mode(0o600));
                own.map_err(on(&file, "protect the key"))?;
                return Ok(secret);
            }
            Err(why) => {
                warn!(path = %file.display(), why, "KV pages on disk cannot be used: beginning anew");
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            warn!(path = %file.display(), "the key is damaged: KV pages on disk cannot be used, beginning anew");
        }
        Err(error) => return Err(on(&file, "read the key")(error)),
    }
    let entries = fs::read_dir(path).map_err(on(path, "list the directory"))?;
    entries.flatten().map(|entry| entry.path()).filter(|path| is_pool(path)).for_each(|path| delete(&path));
    let mut secret = [0; 32];
    getrandom::fill(&mut secret)
        .map_err(|error| on(&file, "draw a key")(io::Error::other(error.to_string())))?;
    let digits: String = secret.iter().map(|byte| format!("{byte:02x}")).collect();
    let new = path.join(fresh(KEY));
    let written = private().create(true).truncate(true).open(&new).and_then(|mut to| {
        to.write_all(format!("{FORMAT} {VERSION} {digits}\n").as_bytes())?;
        to.sync_all()
    });
    written.map_err(on(&new, "write the key"))?;
    fs::rename(&new, &file).map_err(on(&file, "write the key"))?;
    Ok(secret)
}

fn parse(text: &str) -> Result<[u8; 32], &'static str> {
    let rest = text.strip_prefix(FORMAT).and_then(|rest| rest.strip_suffix('\n'));
    let rest = rest.ok_or("the key is damaged")?.trim_start();
    let (version, digits) = rest.split_once(' ').ok_or("the key is damaged")?;
    if version != VERSION.to_string() {
        return Err("they are of another version of the format");
    }
    let mut secret = [0; 32];
    if digits.len() != 64 || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err("the key is damaged");
    }
    for (byte, digits) in secret.iter_mut().zip(digits.as_bytes().chunks(2)) {
        let digits = std::str::from_utf8(digits).map_err(|_| "the key is damaged")?;
        *byte = u8::from_str_radix(digits, 16).map_err(|_| "the key is damaged")?;
    }
    Ok(secret)
}

fn fresh(name: &str) -> String {
    format!("{name}.new")
}

fn is_pool(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.strip_suffix(POOL).is_some_and(|digits| {
        digits.len() == NAME_DIGITS && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
    })
}

/// Bytes of the disk that a pool takes.
fn taken(pool: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(pool) else { return 0 };
    entries.flatten().filter_map(|entry| entry.metadata().ok()).map(|file| file.blocks() * 512).sum()
}

fn delete(pool: &Path) {
    match fs::remove_dir_all(pool) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            warn!(path = %pool.display(), %error, "cannot delete KV pages that are no longer used");
        }
        _ => {}
    }
}

/// An error of the system at a file.
fn on(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> DiskError {
    let path = path.to_owned();
    move |source| DiskError::Io { path, action, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(directory: &Path) -> DiskSettings {
        DiskSettings {
            directory: directory.to_owned(),
            size: ByteSize(1 << 20),
            ttl: None,
            wait: None,
            count_only: false,
        }
    }

    #[test]
    fn one_server_has_a_directory_and_its_key_stays() {
        let place = tempfile::tempdir().unwrap();
        let settings = settings(&place.path().join("deep/kv"));
        let disk = KvDisk::open(&settings).unwrap();
        let error = KvDisk::open(&settings).unwrap_err();
        assert!(matches!(error, DiskError::InUse(_)), "{error}");
        let mode = |path: &Path| fs::metadata(path).unwrap().mode() & 0o777;
        assert_eq!((mode(&settings.directory), mode(&settings.directory.join(KEY))), (0o700, 0o600));
        let secret = disk.secret();
        drop(disk);
        assert_eq!(KvDisk::open(&settings).unwrap().secret(), secret);
        let other = DiskSettings { directory: place.path().join("other"), ..settings };
        assert_ne!(KvDisk::open(&other).unwrap().secret(), secret);
    }

    #[test]
    fn a_directory_of_somebody_else_is_refused_by_name() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("thesis.tex"), "").unwrap();
        let error = KvDisk::open(&settings(place.path())).unwrap_err().to_string();
        assert!(error.contains("thesis.tex"), "{error}");
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 1, "nothing was written");
    }

    #[test]
    fn more_than_there_is_room_for_is_refused_with_the_numbers() {
        let place = tempfile::tempdir().unwrap();
        let settings = DiskSettings { size: ByteSize(usize::MAX / 2), ..settings(place.path()) };
        let error = KvDisk::open(&settings).unwrap_err().to_string();
        assert!(error.contains("kv-disk-size") && error.contains("room for"), "{error}");
    }

    #[test]
    fn pages_without_their_key_are_deleted() {
        let place = tempfile::tempdir().unwrap();
        let settings = settings(place.path());
        let good = {
            KvDisk::open(&settings).unwrap();
            fs::read_to_string(place.path().join(KEY)).unwrap()
        };
        let pool = place.path().join(format!("{}{POOL}", "a".repeat(NAME_DIGITS)));
        for damage in ["", "nonsense", &good[..good.len() - 9], &good.replace(" 1 ", " 2 ")] {
            fs::create_dir_all(&pool).unwrap();
            fs::write(place.path().join(KEY), damage).unwrap();
            KvDisk::open(&settings).unwrap();
            assert!(!pool.exists(), "{damage:?}");
            let now = fs::read_to_string(place.path().join(KEY)).unwrap();
            assert!(parse(&now).is_ok() && now != good);
        }
    }

    #[test]
    fn a_pool_is_one_version_s_and_those_of_nobody_are_swept() {
        let place = tempfile::tempdir().unwrap();
        let settings = settings(place.path());
        let layout = SlotLayout { page_bytes: 1000, most_words: 10 };
        let disk = KvDisk::open(&settings).unwrap();
        let tier = |pool: &Pool| pool.tier(None, layout, 1000).unwrap();
        let (a, b) = (disk.pool("a").unwrap(), disk.pool("b").unwrap());
        assert!(matches!(disk.pool("a"), Err(DiskError::PoolInUse(_))));
        drop((tier(&a), tier(&b)));
        drop(b);
        disk.sweep();
        assert_eq!(disk.pools(), [a.path()]);
        a.delete();
        assert!(disk.pools().is_empty() && disk.pool("a").is_ok());
        // A tier that still has files open keeps the directory.
        let tier = tier(&disk.pool("a").unwrap());
        drop(disk);
        assert!(matches!(KvDisk::open(&settings), Err(DiskError::InUse(_))));
        drop(tier);
    }
}
