//! The SFTP server: version 3, as OpenSSH speaks it, on a pair of byte streams.
//!
//! It runs in a process of its own, as the user and in the user's container, so the kernel enforces all permissions.
//! Requests are answered in order; clients keep many in flight. Paths are relative to the working directory, which is
//! that of the weaver's shells: `scp file ID.loom:` and `ssh ID.loom ls` use the same directory.

mod wire;

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{self, BufRead as _, BufReader, BufWriter, Read, Write},
    os::unix::{
        ffi::OsStrExt as _,
        fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _, PermissionsExt as _},
    },
    path::{Path, PathBuf},
};

use jiff::Timestamp;
use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, RenameFlags, Timespec, Timestamps, futimens, open, renameat_with, statvfs, utimensat,
};

use self::wire::{Attributes, Fields, Refusal, Reply, Status, request};

const VERSION: u32 = 3;
/// In bytes, the same as OpenSSH's.
const MAX_PACKET: usize = 256 << 10;
/// In one read or write, in bytes: a packet without its header.
const MAX_DATA: u32 = (MAX_PACKET - 1024) as u32;
/// Open files and directories.
const MAX_HANDLES: usize = 256;
/// File names in one reply.
const MAX_NAMES: usize = 100;
/// The permission bits that a client may set.
const PERMISSIONS: u32 = 0o7777;
/// In seconds; older files are listed with their year instead of the time, as in `ls -l`.
const HALF_A_YEAR: i64 = 182 * 24 * 3600;

/// The extensions that are served (OpenSSH's PROTOCOL file, §4), with their versions.
const EXTENSIONS: [(&str, &str); 7] = [
    ("posix-rename@openssh.com", "1"),
    ("hardlink@openssh.com", "1"),
    ("fsync@openssh.com", "1"),
    ("lsetstat@openssh.com", "1"),
    ("statvfs@openssh.com", "2"),
    ("limits@openssh.com", "1"),
    ("expand-path@openssh.com", "1"),
];

/// Serves until the input ends. Fails when a stream fails or a packet is too long.
pub(crate) fn serve(input: impl Read, output: impl Write) -> io::Result<()> {
    let mut input = BufReader::with_capacity(MAX_PACKET, input);
    let mut output = BufWriter::with_capacity(MAX_PACKET, output);
    let mut server = Server::default();
    let mut packet = Vec::new();
    while read_packet(&mut input, &mut packet)? {
        output.write_all(&server.answer(&packet).into_packet())?;
        // While more requests are buffered, keep collecting replies.
        if input.buffer().is_empty() {
            output.flush()?;
        }
    }
    output.flush()
}

/// Reads a packet; false at the end of the input.
fn read_packet(input: &mut BufReader<impl Read>, packet: &mut Vec<u8>) -> io::Result<bool> {
    if input.fill_buf()?.is_empty() {
        return Ok(false);
    }
    let mut length = [0; 4];
    input.read_exact(&mut length)?;
    let length = u32::from_be_bytes(length) as usize;
    if length > MAX_PACKET {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "an SFTP packet longer than allowed"));
    }
    packet.resize(length, 0);
    input.read_exact(packet)?;
    Ok(true)
}

/// The client's open files and directories.
#[derive(Default)]
struct Server {
    handles: BTreeMap<u32, Handle>,
    next_handle: u32,
}

enum Handle {
    File(File),
    Directory { path: PathBuf, entries: Box<dyn Iterator<Item = Vec<u8>>> },
}

type Answer = Result<Reply, Refusal>;

impl Server {
    fn answer(&mut self, packet: &[u8]) -> Reply {
        let mut fields = Fields(packet);
        let head = fields.byte().and_then(|kind| Ok((kind, fields.u32()?)));
        let Ok((kind, id)) = head else {
            return Reply::status(0, Status::BadMessage, "Bad message");
        };
        if kind == request::INIT {
            // This packet has no id, but the client's version in its place.
            return Reply::version(VERSION, &EXTENSIONS);
        }
        let answer = self.serve(kind, id, &mut fields);
        answer.unwrap_or_else(|Refusal { status, message }| Reply::status(id, status, &message))
    }

    fn serve(&mut self, kind: u8, id: u32, fields: &mut Fields<'_>) -> Answer {
        match kind {
            request::OPEN => self.open(id, fields),
            request::CLOSE => {
                let handle = fields.handle()?;
                self.handles.remove(&handle).map(|_| done(id)).ok_or_else(no_handle)
            }
            request::READ => self.read(id, fields),
            request::WRITE => {
                let (handle, offset, data) = (fields.handle()?, fields.u64()?, fields.string()?);
                self.file(handle)?.write_all_at(data, offset)?;
                Ok(done(id))
            }
            request::LSTAT => Ok(Reply::attributes(id, &Attributes::from(&fs::symlink_metadata(fields.path()?)?))),
            request::STAT => Ok(Reply::attributes(id, &Attributes::from(&fs::metadata(fields.path()?)?))),
            request::FSTAT => {
                let handle = fields.handle()?;
                Ok(Reply::attributes(id, &Attributes::from(&self.file(handle)?.metadata()?)))
            }
            request::SETSTAT => set_attributes(fields.path()?, &fields.attributes()?).map(|()| done(id)),
            request::FSETSTAT => {
                let handle = fields.handle()?;
                set_file_attributes(self.file(handle)?, &fields.attributes()?).map(|()| done(id))
            }
            request::OPENDIR => self.open_directory(id, fields.path()?),
            request::READDIR => {
                let handle = fields.handle()?;
                self.read_directory(id, handle)
            }
            request::REMOVE => Ok(fs::remove_file(fields.path()?).map(|()| done(id))?),
            request::MKDIR => {
                let (path, attributes) = (fields.path()?, fields.attributes()?);
                let mode = attributes.permissions.unwrap_or(0o777) & PERMISSIONS;
                Ok(fs::DirBuilder::new().mode(mode).create(path).map(|()| done(id))?)
            }
            request::RMDIR => Ok(fs::remove_dir(fields.path()?).map(|()| done(id))?),
            request::REALPATH => Ok(name(id, &real_path(fields.path()?)?)),
            request::RENAME => rename_to_new(fields.path()?, fields.path()?).map(|()| done(id)),
            request::READLINK => Ok(name(id, &fs::read_link(fields.path()?)?)),
            // The target comes first. The draft says otherwise; OpenSSH's PROTOCOL file (§4.1) explains why everyone does this.
            request::SYMLINK => {
                let (target, link) = (fields.path()?, fields.path()?);
                Ok(std::os::unix::fs::symlink(target, link).map(|()| done(id))?)
            }
            request::EXTENDED => self.extended(id, fields),
            _ => Err(Refusal::new(Status::Unsupported, "Operation unsupported")),
        }
    }

    fn extended(&mut self, id: u32, fields: &mut Fields<'_>) -> Answer {
        match fields.string()? {
            b"posix-rename@openssh.com" => Ok(fs::rename(fields.path()?, fields.path()?).map(|()| done(id))?),
            b"hardlink@openssh.com" => Ok(fs::hard_link(fields.path()?, fields.path()?).map(|()| done(id))?),
            b"fsync@openssh.com" => {
                let handle = fields.handle()?;
                Ok(self.file(handle)?.sync_all().map(|()| done(id))?)
            }
            b"lsetstat@openssh.com" => set_link_attributes(fields.path()?, &fields.attributes()?).map(|()| done(id)),
            b"statvfs@openssh.com" => {
                let it = statvfs(fields.path()?)?;
                Ok(Reply::extended(
                    id,
                    &[
                        it.f_bsize,
                        it.f_frsize,
                        it.f_blocks,
                        it.f_bfree,
                        it.f_bavail,
                        it.f_files,
                        it.f_ffree,
                        it.f_favail,
                        it.f_fsid,
                        it.f_flag.bits() & 0b11,
                        it.f_namemax,
                    ],
                ))
            }
            b"limits@openssh.com" => {
                let (packet, data) = (MAX_PACKET as u64, u64::from(MAX_DATA));
                Ok(Reply::extended(id, &[packet, data, data, MAX_HANDLES as u64]))
            }
            b"expand-path@openssh.com" => Ok(name(id, &real_path(&expand(fields.path()?)?)?)),
            _ => Err(Refusal::new(Status::Unsupported, "Operation unsupported")),
        }
    }

    fn open(&mut self, id: u32, fields: &mut Fields<'_>) -> Answer {
        let (path, flags, attributes) = (fields.path()?, fields.u32()?, fields.attributes()?);
        let mode = Mode::from_raw_mode(attributes.permissions.unwrap_or(0o666) & PERMISSIONS);
        let file = open(path, open_flags(flags), mode)?;
        self.add_handle(id, Handle::File(file.into()))
    }

    fn read(&mut self, id: u32, fields: &mut Fields<'_>) -> Answer {
        let (handle, offset, length) = (fields.handle()?, fields.u64()?, fields.u32()?);
        let mut data = vec![0; length.min(MAX_DATA) as usize];
        let read = self.file(handle)?.read_at(&mut data, offset)?;
        if read == 0 && length > 0 {
            return Err(end());
        }
        Ok(Reply::data(id, &data[..read]))
    }

    fn open_directory(&mut self, id: u32, path: &Path) -> Answer {
        let found = fs::read_dir(path)?.filter_map(|entry| Some(entry.ok()?.file_name().as_bytes().to_vec()));
        let entries = [b".".to_vec(), b"..".to_vec()].into_iter().chain(found);
        self.add_handle(id, Handle::Directory { path: path.to_owned(), entries: Box::new(entries) })
    }

    fn read_directory(&mut self, id: u32, handle: u32) -> Answer {
        let Some(Handle::Directory { path, entries }) = self.handles.get_mut(&handle) else {
            return Err(no_handle());
        };
        let now = Timestamp::now().as_second();
        let listed = entries.take(MAX_NAMES).map(|name| {
            let file = path.join(std::ffi::OsStr::from_bytes(&name));
            // The file may have been removed since its name was read.
            let metadata = fs::symlink_metadata(file).ok();
            let attributes = metadata.as_ref().map(Attributes::from).unwrap_or_default();
            let mut line = metadata.map(|metadata| line(&metadata, now).into_bytes()).unwrap_or_default();
            line.extend_from_slice(&name);
            (name, line, attributes)
        });
        let names: Vec<_> = listed.collect();
        if names.is_empty() { Err(end()) } else { Ok(Reply::names(id, &names)) }
    }

    fn add_handle(&mut self, id: u32, handle: Handle) -> Answer {
        if self.handles.len() == MAX_HANDLES {
            return Err(Refusal::new(Status::Failure, "Too many open files"));
        }
        let number = self.next_handle;
        self.next_handle = self.next_handle.wrapping_add(1);
        self.handles.insert(number, handle);
        Ok(Reply::handle(id, number))
    }

    fn file(&self, handle: u32) -> Result<&File, Refusal> {
        match self.handles.get(&handle) {
            Some(Handle::File(file)) => Ok(file),
            _ => Err(no_handle()),
        }
    }
}

fn done(id: u32) -> Reply {
    Reply::status(id, Status::Ok, "Success")
}

fn end() -> Refusal {
    Refusal::new(Status::Eof, "End of file")
}

fn no_handle() -> Refusal {
    Refusal::new(Status::Failure, "No such handle")
}

/// The reply to realpath and readlink: a single name.
fn name(id: u32, path: &Path) -> Reply {
    let name = path.as_os_str().as_bytes().to_vec();
    Reply::names(id, &[(name.clone(), name, Attributes::default())])
}

/// The flags of an open (§6.3).
fn open_flags(flags: u32) -> OFlags {
    let has = |flag: u32| flags & flag != 0;
    let mut open = match (has(0x01), has(0x02)) {
        (true, true) => OFlags::RDWR,
        (false, true) => OFlags::WRONLY,
        _ => OFlags::RDONLY,
    };
    open.set(OFlags::APPEND, has(0x04));
    open.set(OFlags::CREATE, has(0x08));
    open.set(OFlags::TRUNC, has(0x10));
    open.set(OFlags::EXCL, has(0x20));
    open | OFlags::CLOEXEC | OFlags::NOCTTY
}

fn set_attributes(path: &Path, attributes: &Attributes) -> Result<(), Refusal> {
    if let Some(size) = attributes.size {
        File::options().write(true).open(path)?.set_len(size)?;
    }
    if let Some(mode) = attributes.permissions {
        fs::set_permissions(path, fs::Permissions::from_mode(mode & PERMISSIONS))?;
    }
    if let Some(times) = attributes.times {
        utimensat(CWD, path, &timestamps(times), AtFlags::empty())?;
    }
    if let Some((user, group)) = attributes.owner {
        std::os::unix::fs::chown(path, Some(user), Some(group))?;
    }
    Ok(())
}

fn set_file_attributes(file: &File, attributes: &Attributes) -> Result<(), Refusal> {
    if let Some(size) = attributes.size {
        file.set_len(size)?;
    }
    if let Some(mode) = attributes.permissions {
        file.set_permissions(fs::Permissions::from_mode(mode & PERMISSIONS))?;
    }
    if let Some(times) = attributes.times {
        futimens(file, &timestamps(times))?;
    }
    if let Some((user, group)) = attributes.owner {
        std::os::unix::fs::fchown(file, Some(user), Some(group))?;
    }
    Ok(())
}

/// As [`set_attributes`], but does not follow a link at the path's end. Links have no settable size or permissions.
fn set_link_attributes(path: &Path, attributes: &Attributes) -> Result<(), Refusal> {
    if !fs::symlink_metadata(path)?.is_symlink() {
        return set_attributes(path, attributes);
    }
    if let Some(times) = attributes.times {
        utimensat(CWD, path, &timestamps(times), AtFlags::SYMLINK_NOFOLLOW)?;
    }
    if let Some((user, group)) = attributes.owner {
        std::os::unix::fs::lchown(path, Some(user), Some(group))?;
    }
    Ok(())
}

fn timestamps((access, change): (u32, u32)) -> Timestamps {
    let time = |seconds: u32| Timespec { tv_sec: seconds.into(), tv_nsec: 0 };
    Timestamps { last_access: time(access), last_modification: time(change) }
}

/// Resolves links and dots; the last component need not exist.
fn real_path(path: &Path) -> Result<PathBuf, Refusal> {
    match (fs::canonicalize(path), path.parent(), path.file_name()) {
        (Ok(real), ..) => Ok(real),
        (Err(error), Some(parent), Some(last)) if error.kind() == io::ErrorKind::NotFound => {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            Ok(fs::canonicalize(parent)?.join(last))
        }
        (Err(error), ..) => Err(error.into()),
    }
}

/// Expands a leading `~` as a shell does, except for other users' homes.
fn expand(path: &Path) -> Result<PathBuf, Refusal> {
    match path.strip_prefix("~") {
        Ok(rest) => {
            let home = std::env::var_os("HOME").ok_or_else(|| Refusal::new(Status::Failure, "HOME is not set"))?;
            Ok(Path::new(&home).join(rest))
        }
        Err(_) if path.as_os_str().as_bytes().starts_with(b"~") => {
            Err(Refusal::new(Status::NoSuchFile, "the homes of other users are not looked up"))
        }
        Err(_) => Ok(path.to_owned()),
    }
}

/// Renames; fails if the new name exists (§6.5).
fn rename_to_new(old: &Path, new: &Path) -> Result<(), Refusal> {
    match renameat_with(CWD, old, CWD, new, RenameFlags::NOREPLACE) {
        // The file system cannot do this atomically.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            if fs::symlink_metadata(new).is_ok() {
                return Err(Refusal::new(Status::Failure, "File exists"));
            }
            Ok(fs::rename(old, new)?)
        }
        result => Ok(result?),
    }
}

/// A file's line as in `ls -l`, up to its name.
fn line(metadata: &fs::Metadata, now: i64) -> String {
    let mode = metadata.mode();
    let kind = match mode & libc::S_IFMT {
        libc::S_IFDIR => 'd',
        libc::S_IFLNK => 'l',
        libc::S_IFCHR => 'c',
        libc::S_IFBLK => 'b',
        libc::S_IFIFO => 'p',
        libc::S_IFSOCK => 's',
        _ => '-',
    };
    let bits = [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')];
    let permissions: String = bits
        .iter()
        .flat_map(|&(shift, special, letter)| {
            let has = |bit: u32| mode >> shift & bit != 0;
            let execute = match (has(1), mode & special != 0) {
                (true, true) => letter,
                (false, true) => letter.to_ascii_uppercase(),
                (true, false) => 'x',
                (false, false) => '-',
            };
            [if has(4) { 'r' } else { '-' }, if has(2) { 'w' } else { '-' }, execute]
        })
        .collect();
    let changed = Timestamp::from_second(metadata.mtime()).unwrap_or(Timestamp::UNIX_EPOCH);
    let recent = (now - metadata.mtime()).abs() < HALF_A_YEAR;
    let date = changed.strftime(if recent { "%b %e %H:%M" } else { "%b %e  %Y" });
    let (links, user, group, size) = (metadata.nlink(), metadata.uid(), metadata.gid(), metadata.size());
    format!("{kind}{permissions} {links:>4} {user:<8} {group:<8} {size:>8} {date} ")
}
