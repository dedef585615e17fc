//! The wire format of SFTP version 3 (draft-ietf-secsh-filexfer-02). File names are bytes, not text.

use std::{ffi::OsStr, fs::Metadata, io, os::unix::ffi::OsStrExt as _, os::unix::fs::MetadataExt as _, path::Path};

/// Request types (§3).
pub(super) mod request {
    pub(in crate::sftp) const INIT: u8 = 1;
    pub(in crate::sftp) const OPEN: u8 = 3;
    pub(in crate::sftp) const CLOSE: u8 = 4;
    pub(in crate::sftp) const READ: u8 = 5;
    pub(in crate::sftp) const WRITE: u8 = 6;
    pub(in crate::sftp) const LSTAT: u8 = 7;
    pub(in crate::sftp) const FSTAT: u8 = 8;
    pub(in crate::sftp) const SETSTAT: u8 = 9;
    pub(in crate::sftp) const FSETSTAT: u8 = 10;
    pub(in crate::sftp) const OPENDIR: u8 = 11;
    pub(in crate::sftp) const READDIR: u8 = 12;
    pub(in crate::sftp) const REMOVE: u8 = 13;
    pub(in crate::sftp) const MKDIR: u8 = 14;
    pub(in crate::sftp) const RMDIR: u8 = 15;
    pub(in crate::sftp) const REALPATH: u8 = 16;
    pub(in crate::sftp) const STAT: u8 = 17;
    pub(in crate::sftp) const RENAME: u8 = 18;
    pub(in crate::sftp) const READLINK: u8 = 19;
    pub(in crate::sftp) const SYMLINK: u8 = 20;
    pub(in crate::sftp) const EXTENDED: u8 = 200;
}

/// Reply types (§3).
mod reply {
    pub(super) const VERSION: u8 = 2;
    pub(super) const STATUS: u8 = 101;
    pub(super) const HANDLE: u8 = 102;
    pub(super) const DATA: u8 = 103;
    pub(super) const NAME: u8 = 104;
    pub(super) const ATTRS: u8 = 105;
    pub(super) const EXTENDED: u8 = 201;
}

/// Status codes (§7).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Status {
    Ok = 0,
    Eof = 1,
    NoSuchFile = 2,
    PermissionDenied = 3,
    Failure = 4,
    BadMessage = 5,
    Unsupported = 8,
}

/// Why a request fails.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) status: Status,
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    /// The request is truncated.
    pub(super) fn malformed() -> Self {
        Self::new(Status::BadMessage, "Bad message")
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        let status = match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR | libc::EBADF | libc::ELOOP) => Status::NoSuchFile,
            Some(libc::EPERM | libc::EACCES | libc::EROFS) => Status::PermissionDenied,
            Some(libc::ENAMETOOLONG | libc::EINVAL) => Status::BadMessage,
            Some(libc::ENOSYS | libc::EOPNOTSUPP) => Status::Unsupported,
            _ => Status::Failure,
        };
        let message = match status {
            Status::NoSuchFile => "No such file or directory".to_owned(),
            Status::PermissionDenied => "Permission denied".to_owned(),
            _ => error.to_string(),
        };
        Self { status, message }
    }
}

impl From<rustix::io::Errno> for Refusal {
    fn from(error: rustix::io::Errno) -> Self {
        io::Error::from(error).into()
    }
}

/// Parses the fields of a request in order.
pub(super) struct Fields<'a>(pub(super) &'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Refusal> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or_else(Refusal::malformed)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn byte(&mut self) -> Result<u8, Refusal> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn u32(&mut self) -> Result<u32, Refusal> {
        self.take(4)?.try_into().map(u32::from_be_bytes).map_err(|_| Refusal::malformed())
    }

    pub(super) fn u64(&mut self) -> Result<u64, Refusal> {
        self.take(8)?.try_into().map(u64::from_be_bytes).map_err(|_| Refusal::malformed())
    }

    pub(super) fn string(&mut self) -> Result<&'a [u8], Refusal> {
        let length = self.u32()?;
        self.take(usize::try_from(length).map_err(|_| Refusal::malformed())?)
    }

    /// A path; an empty one is the working directory.
    pub(super) fn path(&mut self) -> Result<&'a Path, Refusal> {
        let bytes = self.string()?;
        Ok(Path::new(OsStr::from_bytes(if bytes.is_empty() { b"." } else { bytes })))
    }

    /// A handle from [`Reply::handle`].
    pub(super) fn handle(&mut self) -> Result<u32, Refusal> {
        self.string()?.try_into().map(u32::from_be_bytes).map_err(|_| Refusal::new(Status::Failure, "No such handle"))
    }

    pub(super) fn attributes(&mut self) -> Result<Attributes, Refusal> {
        let flags = self.u32()?;
        let has = |flag| flags & flag != 0;
        let mut attributes = Attributes::default();
        if has(Attributes::SIZE) {
            attributes.size = Some(self.u64()?);
        }
        if has(Attributes::OWNER) {
            attributes.owner = Some((self.u32()?, self.u32()?));
        }
        if has(Attributes::PERMISSIONS) {
            attributes.permissions = Some(self.u32()?);
        }
        if has(Attributes::TIMES) {
            attributes.times = Some((self.u32()?, self.u32()?));
        }
        Ok(attributes)
    }
}

/// A file's attributes; absent ones are `None` (§5).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) size: Option<u64>,
    /// User and group.
    pub(super) owner: Option<(u32, u32)>,
    /// The mode, with the file's type.
    pub(super) permissions: Option<u32>,
    /// Last access and last modification, in seconds since the epoch.
    pub(super) times: Option<(u32, u32)>,
}

impl Attributes {
    const SIZE: u32 = 1;
    const OWNER: u32 = 2;
    const PERMISSIONS: u32 = 4;
    const TIMES: u32 = 8;
}

impl From<&Metadata> for Attributes {
    fn from(metadata: &Metadata) -> Self {
        // Times have 32 bits in this version of the protocol.
        let seconds = |time: i64| u32::try_from(time).unwrap_or_default();
        Self {
            size: Some(metadata.size()),
            owner: Some((metadata.uid(), metadata.gid())),
            permissions: Some(metadata.mode()),
            times: Some((seconds(metadata.atime()), seconds(metadata.mtime()))),
        }
    }
}

/// A reply under construction; [`Self::into_packet`] fills in its length.
pub(super) struct Reply(Vec<u8>);

impl Reply {
    fn begin(kind: u8) -> Self {
        Self(vec![0, 0, 0, 0, kind])
    }

    fn of(kind: u8, id: u32) -> Self {
        Self::begin(kind).u32(id)
    }

    pub(super) fn version(version: u32, extensions: &[(&str, &str)]) -> Self {
        let start = Self::begin(reply::VERSION).u32(version);
        extensions.iter().fold(start, |reply, (name, data)| reply.string(name.as_bytes()).string(data.as_bytes()))
    }

    pub(super) fn status(id: u32, status: Status, message: &str) -> Self {
        Self::of(reply::STATUS, id).u32(status as u32).string(message.as_bytes()).string(b"")
    }

    pub(super) fn handle(id: u32, handle: u32) -> Self {
        Self::of(reply::HANDLE, id).string(&handle.to_be_bytes())
    }

    pub(super) fn data(id: u32, data: &[u8]) -> Self {
        Self::of(reply::DATA, id).string(data)
    }

    pub(super) fn attributes(id: u32, attributes: &Attributes) -> Self {
        Self::of(reply::ATTRS, id).attributes_field(attributes)
    }

    /// File names, each with a line as in `ls -l` and attributes.
    pub(super) fn names(id: u32, names: &[(Vec<u8>, Vec<u8>, Attributes)]) -> Self {
        let count = u32::try_from(names.len()).expect("a reply holds a bounded number of names");
        names.iter().fold(Self::of(reply::NAME, id).u32(count), |reply, (name, line, attributes)| {
            reply.string(name).string(line).attributes_field(attributes)
        })
    }

    pub(super) fn extended(id: u32, numbers: &[u64]) -> Self {
        numbers.iter().fold(Self::of(reply::EXTENDED, id), |reply, number| reply.u64(*number))
    }

    /// The whole packet.
    pub(super) fn into_packet(mut self) -> Vec<u8> {
        let length = u32::try_from(self.0.len() - 4).expect("a reply is bounded");
        self.0[..4].copy_from_slice(&length.to_be_bytes());
        self.0
    }

    fn u32(mut self, number: u32) -> Self {
        self.0.extend_from_slice(&number.to_be_bytes());
        self
    }

    fn u64(mut self, number: u64) -> Self {
        self.0.extend_from_slice(&number.to_be_bytes());
        self
    }

    fn string(self, bytes: &[u8]) -> Self {
        let mut reply = self.u32(u32::try_from(bytes.len()).expect("a string in a reply is bounded"));
        reply.0.extend_from_slice(bytes);
        reply
    }

    fn attributes_field(self, attributes: &Attributes) -> Self {
        let Attributes { size, owner, permissions, times } = attributes;
        let flags = [
            (size.is_some(), Attributes::SIZE),
            (owner.is_some(), Attributes::OWNER),
            (permissions.is_some(), Attributes::PERMISSIONS),
            (times.is_some(), Attributes::TIMES),
        ];
        let mut reply = self.u32(flags.into_iter().filter(|(given, _)| *given).map(|(_, flag)| flag).sum());
        if let Some(size) = size {
            reply = reply.u64(*size);
        }
        if let Some((user, group)) = owner {
            reply = reply.u32(*user).u32(*group);
        }
        if let Some(permissions) = permissions {
            reply = reply.u32(*permissions);
        }
        if let Some((access, change)) = times {
            reply = reply.u32(*access).u32(*change);
        }
        reply
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_read_back_as_they_were_written() {
        let all = Attributes {
            size: Some(1 << 40),
            owner: Some((1000, 100)),
            permissions: Some(0o100_644),
            times: Some((1, 2)),
        };
        for attributes in [Attributes::default(), all.clone(), Attributes { owner: None, size: None, ..all }] {
            let packet = Reply::attributes(7, &attributes).into_packet();
            assert_eq!(u32::from_be_bytes(packet[..4].try_into().unwrap()) as usize, packet.len() - 4);
            let mut fields = Fields(&packet[4..]);
            assert_eq!((fields.byte().unwrap(), fields.u32().unwrap()), (reply::ATTRS, 7));
            assert_eq!(fields.attributes().unwrap(), attributes);
            assert!(fields.0.is_empty());
        }
    }

    #[test]
    fn a_field_that_is_not_there_is_refused() {
        assert_eq!(Fields(&[0, 0, 0, 9, 1]).string().unwrap_err().status, Status::BadMessage);
        assert_eq!(Fields(&[0, 0, 0]).u32().unwrap_err().status, Status::BadMessage);
    }
}
