//! A weaver's agent that a test plays: with the credential of the real one, which is stopped meanwhile, it says on the
//! agent's links whatever a compromised sidecar could.

use std::{fs, net::TcpStream, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use tungstenite::{Message, WebSocket};

use crate::{System, Weaver, api::Answer, keys::KeyPair, processes, system::TIMEOUT};

/// Has taken the place of a weaver's sidecar. The real one goes on, and registers again, when it is dropped.
pub struct Agent<'a> {
    system: &'a System,
    weaver: Weaver,
    sidecar: i32,
    pub keys: KeyPair,
    /// The agent's token for the API.
    pub token: String,
}

/// The control link of an [`Agent`].
pub struct ControlLink {
    socket: WebSocket<TcpStream>,
    /// The server's first message.
    pub welcome: Value,
}

impl<'a> Agent<'a> {
    /// Stops a weaver's sidecar, on the local backend, and registers in its place.
    pub fn in_place_of_the_real_one(system: &'a System, weaver: &Weaver) -> Result<Self> {
        let keys = KeyPair::generate()?;
        let sidecar = system.sidecar(weaver)?.pid;
        processes::signal(sidecar, Signal::STOP);
        let weaver = weaver.clone();
        let mut agent = Self { system, weaver, sidecar, keys, token: String::new() };
        agent.register("0.1.0")?;
        Ok(agent)
    }

    /// Registers, and says that it is of some version.
    pub fn register(&mut self, version: &str) -> Result<()> {
        let answer = self.ask_to_register(version)?;
        ensure!(answer.status == 200, "registering: {answer:?}");
        answer.body["token"].as_str().context("a token")?.clone_into(&mut self.token);
        Ok(())
    }

    /// The same, whatever the answer is. If the server agrees, the token held so far is replaced and good for nothing.
    pub fn ask_to_register(&self, version: &str) -> Result<Answer> {
        // A new one has been put there at each use.
        let credential = fs::read_to_string(self.system.weaver_directory(&self.weaver).join("sidecar/token"))?;
        let proof = self.keys.answer(&self.system.key_challenge()?)?;
        self.system.register_agent(&self.weaver, &credential, version, &self.keys.public(), &proof)
    }

    /// Opens the control link, and hears the welcome.
    pub fn connect(&self) -> Result<ControlLink> {
        let socket = self.system.web_socket(&self.token, "/api/agent/control", None)?;
        let mut link = ControlLink { socket, welcome: Value::Null };
        link.welcome = link.hear("welcome")?;
        Ok(link)
    }

    /// Dials a stream that the server asked for.
    pub fn dial(&self, stream: &str) -> Result<WebSocket<TcpStream>> {
        self.system.web_socket(&self.token, &format!("/api/agent/streams/{stream}"), None)
    }
}

impl System {
    /// Registers as a weaver's agent.
    pub fn register_agent(
        &self,
        weaver: &Weaver,
        credential: &str,
        version: &str,
        key: &str,
        proof: &Value,
    ) -> Result<Answer> {
        let body = json!({
            "weaver_id": weaver.id, "credential": credential.trim(), "version": version, "protocol": 1,
            "wireguard_key": key, "proof": proof,
            "ssh_host_key": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f",
        });
        self.request(None, "POST", "/api/agent/register", Some(&body.to_string()))
    }
}

impl Drop for Agent<'_> {
    fn drop(&mut self) {
        processes::signal(self.sidecar, Signal::CONT);
    }
}

impl ControlLink {
    /// Sends a message. It waits when the server reads no more.
    pub fn say(&mut self, message: &Value) -> Result<()> {
        self.send(Message::text(message.to_string()))
    }

    /// Sends a frame.
    pub fn send(&mut self, frame: Message) -> Result<()> {
        self.socket.send(frame).context("the control link")
    }

    /// Reports that something happened.
    pub fn tell(&mut self, kind: &str, message: &str) -> Result<()> {
        self.say(&json!({"type": "event", "kind": kind, "message": message}))
    }

    /// The next message of a type; what comes before it is passed over.
    pub fn hear(&mut self, kind: &str) -> Result<Value> {
        loop {
            match self.socket.read().with_context(|| format!("waiting for {kind}"))? {
                Message::Text(text) => {
                    let message: Value = serde_json::from_str(&text)?;
                    if message["type"] == kind {
                        return Ok(message);
                    }
                }
                Message::Close(_) => bail!("closed before {kind}"),
                _ => {}
            }
        }
    }

    /// Waits until the server has ended the link.
    pub fn ended(mut self) -> Result<()> {
        self.socket.get_ref().set_read_timeout(Some(TIMEOUT))?;
        loop {
            match self.socket.read() {
                Ok(_) => {}
                Err(tungstenite::Error::Io(error)) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    bail!("the link goes on")
                }
                Err(_) => return Ok(()),
            }
        }
    }

    /// Lets nothing take longer than this: then sending fails.
    pub fn limit(&self, patience: Duration) -> Result<()> {
        Ok(self.socket.get_ref().set_write_timeout(Some(patience))?)
    }
}
