# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_credbroker_global_optspecs
    string join \n h/help V/version
end

function __fish_credbroker_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_credbroker_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_credbroker_using_subcommand
    set -l cmd (__fish_credbroker_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c credbroker -n "__fish_credbroker_needs_command" -s h -l help -d 'Print help'
complete -c credbroker -n "__fish_credbroker_needs_command" -s V -l version -d 'Print version'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "bots" -d 'Block or unblock bots'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "budgets" -d 'Show how much of KuCoin\'s rate limits the accounts have used'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "check-config" -d 'Check the configuration, the rules and all files that they name'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "clock" -d 'Accept a large difference between the exchange\'s clock and the system clock'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "completions" -d 'Print completions for a shell'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "doctor" -d 'Check everything that the broker needs, and print each problem with its fix'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "explain" -d 'Explain a KuCoin error code: meaning, usual cause and fix; without a code, list all codes'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "halt" -d 'Halt an account or all accounts: refuse risk-increasing requests; with --cancel-all, cancel open orders'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "health" -d 'Check whether a running broker is healthy, and print its response'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "keys" -d 'List, register, test, rotate, roll back and revoke keys'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "orders" -d 'Decide about clientOids that are not in the audit log'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "policy" -d 'Explain, check, compare and show rules'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "resume" -d 'End a halt'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "serve" -d 'Run the broker until SIGTERM or Ctrl-C'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and not __fish_seen_subcommand_from block unblock help" -s h -l help -d 'Print help'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and not __fish_seen_subcommand_from block unblock help" -f -a "block" -d 'Block a bot: immediately refuse all its calls, including cancels and reads; the block survives restarts'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and not __fish_seen_subcommand_from block unblock help" -f -a "unblock" -d 'Unblock a bot; its grants in the rules apply again'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and not __fish_seen_subcommand_from block unblock help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from block" -l admin -d 'Path of admin.toml, which has the address of the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from block" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from unblock" -l admin -d 'Path of admin.toml, which has the address of the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from unblock" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from help" -f -a "block" -d 'Block a bot: immediately refuse all its calls, including cancels and reads; the block survives restarts'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from help" -f -a "unblock" -d 'Unblock a bot; its grants in the rules apply again'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand budgets" -l admin -d 'Path of admin.toml, which has the address of the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand budgets" -l json -d 'Print one JSON object per line'
complete -c credbroker -n "__fish_credbroker_using_subcommand budgets" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand check-config" -l config -d 'Path of the configuration file' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand check-config" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and not __fish_seen_subcommand_from accept help" -s h -l help -d 'Print help'
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and not __fish_seen_subcommand_from accept help" -f -a "accept" -d 'Accept that the exchange\'s clock and the broker\'s system clock are more than a day apart'
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and not __fish_seen_subcommand_from accept help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and __fish_seen_subcommand_from accept" -l admin -d 'Path of admin.toml, which has the address of the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and __fish_seen_subcommand_from accept" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and __fish_seen_subcommand_from help" -f -a "accept" -d 'Accept that the exchange\'s clock and the broker\'s system clock are more than a day apart'
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand completions" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand doctor" -l config -d 'The configuration file' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand doctor" -l live -d 'Send test requests with this account\'s keys and compare each response with KuCoin\'s documentation. No real order is placed. The report contains no secret and no balance' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand doctor" -l json -d 'Print one JSON object per line'
complete -c credbroker -n "__fish_credbroker_using_subcommand doctor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand explain" -l scope -d 'Scope: futures, spot-margin or unified. The same code can mean different things in different scopes; without --scope, all meanings are shown' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand explain" -l list -d 'List all topics with their codes'
complete -c credbroker -n "__fish_credbroker_using_subcommand explain" -l json -d 'Print one JSON object per line'
complete -c credbroker -n "__fish_credbroker_using_subcommand explain" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand halt" -l admin -d 'Path of admin.toml, which has the address of the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand halt" -l all -d 'All accounts, including those added to the rules later'
complete -c credbroker -n "__fish_credbroker_using_subcommand halt" -l cancel-all -d 'Also cancel every open order, and report orders that are still open'
complete -c credbroker -n "__fish_credbroker_using_subcommand halt" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand health" -l config -d 'Configuration file, whose `listen.ops` is queried' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand health" -l address -d 'Address to query, instead of the one in the configuration' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand health" -l ready -d 'Check whether the broker is ready (/readyz), and not only whether it is running (/healthz)'
complete -c credbroker -n "__fish_credbroker_using_subcommand health" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -s h -l help -d 'Print help'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "list" -d 'List keys and their health'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "register" -d 'Test a key, write it to Vault and start using it; a key that fails its test is not stored'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "revoke" -d 'Revoke a key, or all keys of an account, immediately and permanently'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "rollback" -d 'Return to the previous version of a key, or to the one given by --to; --newest undoes that'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "rotate" -d 'Replace a key with a new one, as `register` does; the previous key signs until the new one has passed its tests'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "test" -d 'Test a loaded key'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from list" -l admin -d 'Path of admin.toml, which has the address of the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from list" -l json -d 'Print one JSON object per line'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -l scope -d 'Scope that the key is used for; may be repeated. Default: the scopes in the rules' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -l key -d 'Name of the key; required if the account has several' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -l admin -d 'Path of admin.toml, which has the address of the broker and your login to Vault' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -l try-order -d 'Also validate an order with the exchange\'s test endpoint, in each scope that has one; no order is placed'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -l other-account -d 'Accept a key of a different KuCoin account than the previous key\'s'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -l enable -d 'Enable the key if it is disabled in Vault'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from revoke" -l admin -d 'Path of admin.toml, which has the address of the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from revoke" -l key -d 'Key to revoke. Default: every key of the account' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from revoke" -l yes -d 'Skip the confirmation when --key is missing'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from revoke" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rollback" -l key -d 'Name of the key; required if the account has several' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rollback" -l to -d 'Version in Vault to return to. Default: the version before the current one' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rollback" -l admin -d 'Path of admin.toml, which has the address of the broker and your login to Vault' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rollback" -l newest -d 'Undo a rollback: use the newest version again'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rollback" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -l scope -d 'Scope that the key is used for; may be repeated. Default: the scopes in the rules' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -l key -d 'Name of the key; required if the account has several' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -l admin -d 'Path of admin.toml, which has the address of the broker and your login to Vault' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -l try-order -d 'Also validate an order with the exchange\'s test endpoint, in each scope that has one; no order is placed'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -l other-account -d 'Accept a key of a different KuCoin account than the previous key\'s'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -l enable -d 'Enable the key if it is disabled in Vault'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from test" -l key -d 'Name of the key; required if the account has several' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from test" -l admin -d 'Path of admin.toml, which has the address of the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from test" -l try-order -d 'Also validate an order with the exchange\'s test endpoint, in each scope that has one; no order is placed'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from test" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "list" -d 'List keys and their health'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "register" -d 'Test a key, write it to Vault and start using it; a key that fails its test is not stored'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "revoke" -d 'Revoke a key, or all keys of an account, immediately and permanently'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "rollback" -d 'Return to the previous version of a key, or to the one given by --to; --newest undoes that'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "rotate" -d 'Replace a key with a new one, as `register` does; the previous key signs until the new one has passed its tests'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "test" -d 'Test a loaded key'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and not __fish_seen_subcommand_from accept-gap settle help" -s h -l help -d 'Print help'
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and not __fish_seen_subcommand_from accept-gap settle help" -f -a "accept-gap" -d 'Accept that the audit log does not show all clientOids that were used'
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and not __fish_seen_subcommand_from accept-gap settle help" -f -a "settle" -d 'Free the clientOid of an order that was not placed'
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and not __fish_seen_subcommand_from accept-gap settle help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and __fish_seen_subcommand_from accept-gap" -l admin -d 'Path of admin.toml, which has the address of the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and __fish_seen_subcommand_from accept-gap" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and __fish_seen_subcommand_from settle" -l scope -d 'Scope of the order; needed only if orders of several scopes have this clientOid' -r -f -a "spot-margin\t''
futures\t''
unified\t''"
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and __fish_seen_subcommand_from settle" -l admin -d 'Path of admin.toml, which has the address of the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and __fish_seen_subcommand_from settle" -l absent -d 'The order does not exist at KuCoin: it is not open, filled or cancelled'
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and __fish_seen_subcommand_from settle" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and __fish_seen_subcommand_from help" -f -a "accept-gap" -d 'Accept that the audit log does not show all clientOids that were used'
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and __fish_seen_subcommand_from help" -f -a "settle" -d 'Free the clientOid of an order that was not placed'
complete -c credbroker -n "__fish_credbroker_using_subcommand orders; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and not __fish_seen_subcommand_from check diff explain show help" -s h -l help -d 'Print help'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and not __fish_seen_subcommand_from check diff explain show help" -f -a "check" -d 'Check a rules file: report every problem with its line, and warn about likely mistakes'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and not __fish_seen_subcommand_from check diff explain show help" -f -a "diff" -d 'Compare two rules files: show which bot gains or loses which endpoint on which account'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and not __fish_seen_subcommand_from check diff explain show help" -f -a "explain" -d 'Show whether a bot may send a request, and which lines of the rules allow it'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and not __fish_seen_subcommand_from check diff explain show help" -f -a "show" -d 'List what a rules file allows: one line per bot, account, scope and endpoint, and one per account setting'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and not __fish_seen_subcommand_from check diff explain show help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from check" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from diff" -l json -d 'Print one JSON object per line'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from diff" -l exit-code -d 'Exit with code 1 if something changes'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from diff" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from explain" -l config -d 'Configuration file, which names the rules file and sets the limits of requests' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from explain" -l rules -d 'Rules file, instead of the one that the configuration names' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from explain" -l bot -d 'Bot, as named in its certificate' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from explain" -l account -d 'Account, as named in the rules' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from explain" -l scope -d 'Scope: futures, spot-margin or unified' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from explain" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from show" -l json -d 'Print one JSON object per line'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from help" -f -a "check" -d 'Check a rules file: report every problem with its line, and warn about likely mistakes'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from help" -f -a "diff" -d 'Compare two rules files: show which bot gains or loses which endpoint on which account'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from help" -f -a "explain" -d 'Show whether a bot may send a request, and which lines of the rules allow it'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from help" -f -a "show" -d 'List what a rules file allows: one line per bot, account, scope and endpoint, and one per account setting'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand resume" -l admin -d 'Path of admin.toml, which has the address of the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand resume" -l all -d 'All accounts, including those added to the rules later'
complete -c credbroker -n "__fish_credbroker_using_subcommand resume" -l yes -d 'Skip the confirmation of --all'
complete -c credbroker -n "__fish_credbroker_using_subcommand resume" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand serve" -l config -d 'Path of the configuration file' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand serve" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "bots" -d 'Block or unblock bots'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "budgets" -d 'Show how much of KuCoin\'s rate limits the accounts have used'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "check-config" -d 'Check the configuration, the rules and all files that they name'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "clock" -d 'Accept a large difference between the exchange\'s clock and the system clock'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "completions" -d 'Print completions for a shell'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "doctor" -d 'Check everything that the broker needs, and print each problem with its fix'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "explain" -d 'Explain a KuCoin error code: meaning, usual cause and fix; without a code, list all codes'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "halt" -d 'Halt an account or all accounts: refuse risk-increasing requests; with --cancel-all, cancel open orders'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "health" -d 'Check whether a running broker is healthy, and print its response'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "keys" -d 'List, register, test, rotate, roll back and revoke keys'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "orders" -d 'Decide about clientOids that are not in the audit log'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "policy" -d 'Explain, check, compare and show rules'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "resume" -d 'End a halt'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "serve" -d 'Run the broker until SIGTERM or Ctrl-C'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots budgets check-config clock completions doctor explain halt health keys orders policy resume serve help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from bots" -f -a "block" -d 'Block a bot: immediately refuse all its calls, including cancels and reads; the block survives restarts'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from bots" -f -a "unblock" -d 'Unblock a bot; its grants in the rules apply again'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from clock" -f -a "accept" -d 'Accept that the exchange\'s clock and the broker\'s system clock are more than a day apart'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from keys" -f -a "list" -d 'List keys and their health'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from keys" -f -a "register" -d 'Test a key, write it to Vault and start using it; a key that fails its test is not stored'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from keys" -f -a "revoke" -d 'Revoke a key, or all keys of an account, immediately and permanently'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from keys" -f -a "rollback" -d 'Return to the previous version of a key, or to the one given by --to; --newest undoes that'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from keys" -f -a "rotate" -d 'Replace a key with a new one, as `register` does; the previous key signs until the new one has passed its tests'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from keys" -f -a "test" -d 'Test a loaded key'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from orders" -f -a "accept-gap" -d 'Accept that the audit log does not show all clientOids that were used'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from orders" -f -a "settle" -d 'Free the clientOid of an order that was not placed'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from policy" -f -a "check" -d 'Check a rules file: report every problem with its line, and warn about likely mistakes'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from policy" -f -a "diff" -d 'Compare two rules files: show which bot gains or loses which endpoint on which account'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from policy" -f -a "explain" -d 'Show whether a bot may send a request, and which lines of the rules allow it'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from policy" -f -a "show" -d 'List what a rules file allows: one line per bot, account, scope and endpoint, and one per account setting'
