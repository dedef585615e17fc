//! The names of images.

use super::RegistryError;

/// An image's name, with what container runtimes add to it: `python` is `docker.io/library/python:latest`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Reference {
    host: String,
    repository: String,
    tag: String,
    digest: Option<String>,
}

impl Reference {
    /// Reads a name. What is not checked here, the URL that is made of it is.
    pub(in super::super) fn parse(image: &str) -> Result<Self, RegistryError> {
        let (name, digest) = image.split_once('@').map_or((image, None), |(name, digest)| (name, Some(digest)));
        let (path, tag) = match name.rsplit_once(':') {
            // The colon before a port comes before a slash.
            Some((path, tag)) if !tag.contains('/') => (path, tag),
            _ => (name, "latest"),
        };
        let (host, repository) = match path.split_once('/') {
            Some((host, rest)) if host.contains(['.', ':']) || host == "localhost" => (host, rest.to_owned()),
            Some(_) => ("docker.io", path.to_owned()),
            None => ("docker.io", format!("library/{path}")),
        };
        let is_part = |part: &str| {
            !part.trim_matches('.').is_empty()
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        };
        let is_good = repository.split('/').all(is_part) && is_part(tag) && digest.is_none_or(super::is_digest);
        if !is_good {
            return Err(RegistryError::InvalidName);
        }
        Ok(Self { host: host.to_owned(), repository, tag: tag.to_owned(), digest: digest.map(str::to_owned) })
    }

    /// Where the registry is: `HOST[:PORT]`.
    pub(in super::super) fn registry(&self) -> &str {
        if self.host == "docker.io" { "index.docker.io" } else { &self.host }
    }

    pub(super) fn repository(&self) -> &str {
        &self.repository
    }

    pub(in super::super) fn tag(&self) -> &str {
        &self.tag
    }

    pub(in super::super) fn digest(&self) -> Option<&str> {
        self.digest.as_deref()
    }

    /// The same image by its digest, whatever its tag stands for later.
    pub(in super::super) fn pinned(&self, digest: &str) -> String {
        format!("{}/{}@{digest}", self.host, self.repository)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_completed_as_container_runtimes_do() {
        let parts = |image: &str| {
            let reference = Reference::parse(image).unwrap();
            (reference.registry().to_owned(), reference.repository, reference.tag)
        };
        let whole = |registry: &str, repository: &str, tag: &str| (registry.into(), repository.into(), tag.into());
        assert_eq!(parts("python"), whole("index.docker.io", "library/python", "latest"));
        assert_eq!(parts("team/app:1.2"), whole("index.docker.io", "team/app", "1.2"));
        assert_eq!(parts("r.example:5000/a/b"), whole("r.example:5000", "a/b", "latest"));
        assert_eq!(parts("localhost/a:1"), whole("localhost", "a", "1"));
    }

    #[test]
    fn a_pinned_name_has_a_digest_instead_of_a_tag() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let reference = Reference::parse(&format!("python:3.13@{digest}")).unwrap();
        assert_eq!(reference.digest(), Some(digest.as_str()));
        assert_eq!(reference.pinned(&digest), format!("docker.io/library/python@{digest}"));
    }

    #[test]
    fn what_would_change_the_path_of_a_request_is_no_name() {
        for name in ["", "r.example/", "r.example/../v2", "r.example/a?b", "r.example/a%2fb", "a:b#c", "a@sha256:1"] {
            assert_eq!(Reference::parse(name), Err(RegistryError::InvalidName), "{name}");
        }
    }
}
