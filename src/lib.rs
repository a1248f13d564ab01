//! credbroker: sends the unsigned requests of trading bots to KuCoin, signed with keys that the bots never see.
//!
//! In reading order: [`broker`] is the request path; [`policy`], [`audit`], [`keyring`], [`clock`] and [`egress`] answer
//! its questions; [`kucoin`] holds the exchange's rules, [`restrictions`] what admins have forbidden; [`outcome`], [`diagnosis`], [`ids`], [`pem`], [`secret`], [`text`] and [`trust`] are what all else is made
//! of. [`api`] holds the doors, [`server`] puts everything together from [`config`], [`process`] closes the process to others, [`cli`] is the command line.

pub mod api;
pub mod audit;
pub mod broker;
pub mod cli;
pub mod clock;
pub mod config;
pub mod diagnosis;
pub mod egress;
mod encoding;
pub mod ids;
pub mod keyring;
pub mod kucoin;
mod lock;
pub mod outcome;
pub mod pem;
pub mod policy;
pub mod process;
pub mod restrictions;
pub mod secret;
pub mod server;
pub mod telemetry;
pub mod text;
pub mod toml_file;
pub mod trust;
