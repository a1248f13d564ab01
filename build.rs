//! Compiles `proto/` with protox, so that the build needs only cargo and no protoc.

use std::env;
use std::error::Error;
use std::fs;
use std::path::PathBuf;

use prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/credbroker");
    // For gRPC reflection on the listener for bots: only their API, not that of admins.
    let descriptors = protox::compile(["credbroker/v1/broker.proto"], ["proto"])?;
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("cargo sets OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .bytes(".")
        .build_transport(false)
        .codec_path("crate::proto::codec::SmallBuffers")
        // A derived `Debug` would show the key; src/proto.rs implements one that does not.
        .skip_debug(["credbroker.v1.Candidate"])
        .compile_fds(protox::compile(["credbroker/v1/admin.proto"], ["proto"])?)?;
    Ok(())
}
