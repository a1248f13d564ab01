# Who registers, rotates, disables and revokes keys: writes every account of one environment and reads no secret back.
#
# `kv` and `kucoin/prod` are `vault.mount` and `vault.prefix` of the broker's configuration.
# Not here, on purpose: `read` below `data/`, and what cannot be taken back (`destroy`, `delete` below `metadata/`).
# What this policy cannot prevent: `max_versions=1` in the metadata of a key prunes its old versions at the next write.

path "kv/data/kucoin/prod/*"     { capabilities = ["create", "update"] }
path "kv/metadata/kucoin/prod/*" { capabilities = ["create", "list", "read", "update"] }
path "kv/delete/kucoin/prod/*"   { capabilities = ["update"] }
path "kv/undelete/kucoin/prod/*" { capabilities = ["update"] }
