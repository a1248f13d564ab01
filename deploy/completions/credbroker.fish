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
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "bots" -d 'Keeps bots out, and lets them in again'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "check-config" -d 'Reports every problem of the configuration, the rules and the files they name'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "clock" -d 'Manage exchange clock checks'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "completions" -d 'Print completions for a shell'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "doctor" -d 'Looks at everything that the broker needs, and says what is wrong and what to do; the broker need not run'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "explain" -d 'Says what a code of KuCoin means, why it usually comes, and what to do; without a code, lists them all'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "halt" -d 'Halt an account or all accounts: reject new risk, and cancel open orders if asked to'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "health" -d 'Asks a running broker whether it is healthy, and prints its answer'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "keys" -d 'Registers, tests, rotates, stops and shows keys'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "policy" -d 'Explains, checks and compares rules'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "resume" -d 'Ends a halt'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "serve" -d 'Runs the broker until SIGTERM or Ctrl-C'
complete -c credbroker -n "__fish_credbroker_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and not __fish_seen_subcommand_from block unblock help" -s h -l help -d 'Print help'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and not __fish_seen_subcommand_from block unblock help" -f -a "block" -d 'Refuses every call of a bot, cancels and reads too, at once and also after a restart of the broker'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and not __fish_seen_subcommand_from block unblock help" -f -a "unblock" -d 'Lets a blocked bot call again; the rules say what it may'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and not __fish_seen_subcommand_from block unblock help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from block" -l admin -d 'How to reach the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from block" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from unblock" -l admin -d 'How to reach the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from unblock" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from help" -f -a "block" -d 'Refuses every call of a bot, cancels and reads too, at once and also after a restart of the broker'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from help" -f -a "unblock" -d 'Lets a blocked bot call again; the rules say what it may'
complete -c credbroker -n "__fish_credbroker_using_subcommand bots; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand check-config" -l config -d 'The configuration file' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand check-config" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and not __fish_seen_subcommand_from accept help" -s h -l help -d 'Print help'
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and not __fish_seen_subcommand_from accept help" -f -a "accept" -d 'Accept that the exchange\'s clock and the broker\'s system clock are more than a day apart'
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and not __fish_seen_subcommand_from accept help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and __fish_seen_subcommand_from accept" -l admin -d 'How to reach the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and __fish_seen_subcommand_from accept" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and __fish_seen_subcommand_from help" -f -a "accept" -d 'Accept that the exchange\'s clock and the broker\'s system clock are more than a day apart'
complete -c credbroker -n "__fish_credbroker_using_subcommand clock; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand completions" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand doctor" -l config -d 'The configuration file' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand doctor" -l live -d 'Asks the exchange about this account and with its keys, and compares each answer with what is documented; no order is placed. The report holds no secret and no balance' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand doctor" -l json -d 'Writes a JSON object a line, for machines'
complete -c credbroker -n "__fish_credbroker_using_subcommand doctor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand explain" -l scope -d 'futures, spot-margin or unified, where a code means different things; without it all of them are shown' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand explain" -l list -d 'Lists all topics with their codes'
complete -c credbroker -n "__fish_credbroker_using_subcommand explain" -l json -d 'Writes a JSON object a line, for machines'
complete -c credbroker -n "__fish_credbroker_using_subcommand explain" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand halt" -l admin -d 'How to reach the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand halt" -l all -d 'Every account, also those that the rules name later'
complete -c credbroker -n "__fish_credbroker_using_subcommand halt" -l cancel-all -d 'Cancels every open order too, and looks what is still open'
complete -c credbroker -n "__fish_credbroker_using_subcommand halt" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand health" -l config -d 'The configuration file, whose `listen.ops` is asked' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand health" -l address -d 'The address to ask, without a configuration' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand health" -l ready -d 'Asks whether it can do its work (/readyz), and not only whether it runs (/healthz)'
complete -c credbroker -n "__fish_credbroker_using_subcommand health" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -s h -l help -d 'Print help'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "list" -d 'Shows every key that the rules name, and how it is'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "register" -d 'Tests a key, writes it to Vault and puts it to use; or says what is wrong with it, and stores nothing'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "revoke" -d 'Kills a key, or all keys of an account, at once and for good: only another key lifts it. Vault is not needed'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "rollback" -d 'Goes back to the version before, or to another one; --newest undoes that'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "rotate" -d 'Puts another key in the place of one that is there, as `register` does; the one before serves until the new one has proven itself'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "test" -d 'Tests the key that a running broker has in memory'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and not __fish_seen_subcommand_from list register revoke rollback rotate test help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from list" -l admin -d 'How to reach the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from list" -l json -d 'Writes a JSON object a line, for machines'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from list" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -l scope -d 'Scope that the key serves; may be repeated. Default: the scopes in the rules' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -l key -d 'Name of the key, where the account has several' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -l admin -d 'How to reach the broker and Vault' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -l try-order -d 'Has an order validated too, by the exchange\'s test endpoint, in each scope that has one; none is placed'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -l other-account -d 'Takes a key of another KuCoin account than the key before it'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -l enable -d 'Switches the key on again if it is disabled in Vault'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from register" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from revoke" -l admin -d 'How to reach the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from revoke" -l key -d 'One key of the account; all of them without it' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from revoke" -l yes -d 'Skip the confirmation when --key is missing'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from revoke" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rollback" -l key -d 'Name of the key, where the account has several' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rollback" -l to -d 'The version to go to, as Vault counts. Without it: the one before the one to be used now' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rollback" -l admin -d 'How to reach the broker and Vault' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rollback" -l newest -d 'Undoes a rollback: the newest version is used again'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rollback" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -l scope -d 'Scope that the key serves; may be repeated. Default: the scopes in the rules' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -l key -d 'Name of the key, where the account has several' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -l admin -d 'How to reach the broker and Vault' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -l try-order -d 'Has an order validated too, by the exchange\'s test endpoint, in each scope that has one; none is placed'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -l other-account -d 'Takes a key of another KuCoin account than the key before it'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -l enable -d 'Switches the key on again if it is disabled in Vault'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from rotate" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from test" -l key -d 'Name of the key, where the account has several' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from test" -l admin -d 'How to reach the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from test" -l try-order -d 'Has an order validated too, by the exchange\'s test endpoint, in each scope that has one; none is placed'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from test" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "list" -d 'Shows every key that the rules name, and how it is'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "register" -d 'Tests a key, writes it to Vault and puts it to use; or says what is wrong with it, and stores nothing'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "revoke" -d 'Kills a key, or all keys of an account, at once and for good: only another key lifts it. Vault is not needed'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "rollback" -d 'Goes back to the version before, or to another one; --newest undoes that'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "rotate" -d 'Puts another key in the place of one that is there, as `register` does; the one before serves until the new one has proven itself'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "test" -d 'Tests the key that a running broker has in memory'
complete -c credbroker -n "__fish_credbroker_using_subcommand keys; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and not __fish_seen_subcommand_from check diff explain show help" -s h -l help -d 'Print help'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and not __fish_seen_subcommand_from check diff explain show help" -f -a "check" -d 'Reports every problem of a rules file with its line, and warns of what is hardly meant'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and not __fish_seen_subcommand_from check diff explain show help" -f -a "diff" -d 'Compares two rules files: which bot gains or loses which endpoint on which account'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and not __fish_seen_subcommand_from check diff explain show help" -f -a "explain" -d 'Says whether a bot may send a request, and by which lines of the rules'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and not __fish_seen_subcommand_from check diff explain show help" -f -a "show" -d 'Lists what a rules file allows: a line for each bot, account, scope and endpoint, and for each setting of an account'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and not __fish_seen_subcommand_from check diff explain show help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from check" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from diff" -l json -d 'Writes a JSON object a line, for machines'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from diff" -l exit-code -d 'Ends with exit code 1 when something changes'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from diff" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from explain" -l config -d 'The configuration file, which names the rules file and the limits of requests' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from explain" -l rules -d 'The rules file, without a configuration' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from explain" -l bot -d 'The bot, as its certificate names it' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from explain" -l account -d 'The account' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from explain" -l scope -d 'futures, spot-margin or unified' -r
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from explain" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from show" -l json -d 'Writes a JSON object a line, for machines'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from show" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from help" -f -a "check" -d 'Reports every problem of a rules file with its line, and warns of what is hardly meant'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from help" -f -a "diff" -d 'Compares two rules files: which bot gains or loses which endpoint on which account'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from help" -f -a "explain" -d 'Says whether a bot may send a request, and by which lines of the rules'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from help" -f -a "show" -d 'Lists what a rules file allows: a line for each bot, account, scope and endpoint, and for each setting of an account'
complete -c credbroker -n "__fish_credbroker_using_subcommand policy; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand resume" -l admin -d 'How to reach the broker' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand resume" -l all -d 'Every account, also those that the rules name later'
complete -c credbroker -n "__fish_credbroker_using_subcommand resume" -l yes -d 'Skip the confirmation of --all'
complete -c credbroker -n "__fish_credbroker_using_subcommand resume" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand serve" -l config -d 'The configuration file' -r -F
complete -c credbroker -n "__fish_credbroker_using_subcommand serve" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "bots" -d 'Keeps bots out, and lets them in again'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "check-config" -d 'Reports every problem of the configuration, the rules and the files they name'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "clock" -d 'Manage exchange clock checks'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "completions" -d 'Print completions for a shell'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "doctor" -d 'Looks at everything that the broker needs, and says what is wrong and what to do; the broker need not run'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "explain" -d 'Says what a code of KuCoin means, why it usually comes, and what to do; without a code, lists them all'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "halt" -d 'Halt an account or all accounts: reject new risk, and cancel open orders if asked to'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "health" -d 'Asks a running broker whether it is healthy, and prints its answer'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "keys" -d 'Registers, tests, rotates, stops and shows keys'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "policy" -d 'Explains, checks and compares rules'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "resume" -d 'Ends a halt'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "serve" -d 'Runs the broker until SIGTERM or Ctrl-C'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and not __fish_seen_subcommand_from bots check-config clock completions doctor explain halt health keys policy resume serve help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from bots" -f -a "block" -d 'Refuses every call of a bot, cancels and reads too, at once and also after a restart of the broker'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from bots" -f -a "unblock" -d 'Lets a blocked bot call again; the rules say what it may'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from clock" -f -a "accept" -d 'Accept that the exchange\'s clock and the broker\'s system clock are more than a day apart'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from keys" -f -a "list" -d 'Shows every key that the rules name, and how it is'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from keys" -f -a "register" -d 'Tests a key, writes it to Vault and puts it to use; or says what is wrong with it, and stores nothing'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from keys" -f -a "revoke" -d 'Kills a key, or all keys of an account, at once and for good: only another key lifts it. Vault is not needed'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from keys" -f -a "rollback" -d 'Goes back to the version before, or to another one; --newest undoes that'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from keys" -f -a "rotate" -d 'Puts another key in the place of one that is there, as `register` does; the one before serves until the new one has proven itself'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from keys" -f -a "test" -d 'Tests the key that a running broker has in memory'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from policy" -f -a "check" -d 'Reports every problem of a rules file with its line, and warns of what is hardly meant'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from policy" -f -a "diff" -d 'Compares two rules files: which bot gains or loses which endpoint on which account'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from policy" -f -a "explain" -d 'Says whether a bot may send a request, and by which lines of the rules'
complete -c credbroker -n "__fish_credbroker_using_subcommand help; and __fish_seen_subcommand_from policy" -f -a "show" -d 'Lists what a rules file allows: a line for each bot, account, scope and endpoint, and for each setting of an account'
