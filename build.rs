//! Compiles `proto/` with protox, so that cargo alone builds the project.

use std::env;
use std::error::Error;
use std::fs;
use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/credbroker");
    // What the bots' reflection shows: their own door, and not that of admins.
    let descriptors = protox::compile(["credbroker/v1/broker.proto"], ["proto"])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".")
        .build_transport(false)
        .codec_path("crate::proto::codec::SmallBuffers")
        // It would show a key: src/proto.rs has one that does not.
        .skip_debug(["credbroker.v1.Candidate"])
        .compile_fds(protox::compile(["credbroker/v1/admin.proto"], ["proto"])?)?;
    Ok(())
}
