//! How much CPU and memory a weaver may use.

use anyhow::{Result, ensure};
use clap::Args;
use loom_api::weaver::ResourceSpec;
use serde::{Deserialize, Serialize};

/// What was given.
#[derive(Args, Debug, Clone, Default, Serialize, Deserialize)]
#[group(skip)]
#[serde(rename_all = "kebab-case")]
pub struct Settings {
    /// Limit of CPU, in thousandths of a core, when a request names none. [default: 2000]
    #[arg(long, env = "LOOM_SERVER_CPU_MILLICORES", value_name = "N", global = true)]
    cpu_millicores: Option<u32>,
    /// Limit of memory, in MiB, when a request names none. [default: 2048]
    #[arg(long, env = "LOOM_SERVER_MEMORY_MB", value_name = "N", global = true)]
    memory_mb: Option<u32>,
    /// The most CPU that a request may name, in thousandths of a core. [default: 16000]
    #[arg(long, env = "LOOM_SERVER_MAX_CPU_MILLICORES", value_name = "N", global = true)]
    max_cpu_millicores: Option<u32>,
    /// The most memory that a request may name, in MiB. [default: 32768]
    #[arg(long, env = "LOOM_SERVER_MAX_MEMORY_MB", value_name = "N", global = true)]
    max_memory_mb: Option<u32>,
}

/// The settings in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// What a weaver gets when a request does not say.
    pub default: ResourceSpec,
    /// The most that a request may name.
    pub max: ResourceSpec,
}

impl Settings {
    /// Checks the settings, and fills in the defaults.
    ///
    /// # Errors
    ///
    /// When a weaver would get nothing, or by default more than it may have.
    pub(crate) fn resolve(self) -> Result<Config> {
        let cpu_millicores = self.cpu_millicores.unwrap_or(2000);
        let memory_mb = self.memory_mb.unwrap_or(2048);
        ensure!(cpu_millicores > 0 && memory_mb > 0, "CPU and memory must be above zero");
        let max = ResourceSpec {
            cpu_millicores: self.max_cpu_millicores.unwrap_or_else(|| cpu_millicores.max(16_000)),
            memory_mb: self.max_memory_mb.unwrap_or_else(|| memory_mb.max(32_768)),
        };
        ensure!(
            cpu_millicores <= max.cpu_millicores && memory_mb <= max.memory_mb,
            "cpu-millicores and memory-mb must not be above max-cpu-millicores and max-memory-mb"
        );
        Ok(Config { default: ResourceSpec { cpu_millicores, memory_mb }, max })
    }
}

/// Why a weaver cannot have the resources that a request names.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResourcesRefused {
    /// Without both it could not run.
    #[error("resources must be above zero")]
    Zero,
    /// See `max-cpu-millicores`.
    #[error("a weaver on this server has at most {max} thousandths of a core, not {asked}")]
    Cpu {
        /// What the request names.
        asked: u32,
        /// What it may name.
        max: u32,
    },
    /// See `max-memory-mb`.
    #[error("a weaver on this server has at most {max} MiB of memory, not {asked}")]
    Memory {
        /// What the request names.
        asked: u32,
        /// What it may name.
        max: u32,
    },
}

impl Config {
    /// What a weaver gets for a request.
    ///
    /// # Errors
    ///
    /// When it asks for nothing, or for more than it may have.
    pub fn choose(&self, asked: Option<ResourceSpec>) -> Result<ResourceSpec, ResourcesRefused> {
        let asked = asked.unwrap_or(self.default);
        if asked.cpu_millicores == 0 || asked.memory_mb == 0 {
            return Err(ResourcesRefused::Zero);
        }
        if asked.cpu_millicores > self.max.cpu_millicores {
            return Err(ResourcesRefused::Cpu { asked: asked.cpu_millicores, max: self.max.cpu_millicores });
        }
        if asked.memory_mb > self.max.memory_mb {
            return Err(ResourcesRefused::Memory { asked: asked.memory_mb, max: self.max.memory_mb });
        }
        Ok(asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn spec(cpu_millicores: u32, memory_mb: u32) -> ResourceSpec {
        ResourceSpec { cpu_millicores, memory_mb }
    }

    #[test]
    fn a_request_gets_what_it_names_up_to_the_maxima() {
        let config = Config { default: spec(500, 512), max: spec(1000, 1024) };
        assert_eq!(config.choose(None), Ok(spec(500, 512)));
        assert_eq!(config.choose(Some(spec(1000, 1024))), Ok(spec(1000, 1024)));
        assert_eq!(config.choose(Some(spec(1001, 1))), Err(ResourcesRefused::Cpu { asked: 1001, max: 1000 }));
        assert_eq!(config.choose(Some(spec(1, 1025))), Err(ResourcesRefused::Memory { asked: 1025, max: 1024 }));
        assert_eq!(config.choose(Some(spec(0, 1))), Err(ResourcesRefused::Zero));
    }

    #[test]
    fn a_default_above_the_usual_maximum_raises_it_and_above_a_given_one_is_an_error() {
        let large = Settings { memory_mb: Some(65_536), ..Settings::default() };
        assert_eq!(large.clone().resolve().unwrap().max, spec(16_000, 65_536));
        assert!(Settings { max_memory_mb: Some(4096), ..large }.resolve().is_err());
    }
}
