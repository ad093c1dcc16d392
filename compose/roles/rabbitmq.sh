#!/bin/sh
# Users with few rights for orderbus, on a vhost that exists:
#
#   rabbitmq.sh service VHOST USER GROUP [TOPICS]   the consumer group GROUP: its own queues, and no other group's
#   rabbitmq.sh relay VHOST USER                    publishes the outbox: no group's queue
#   rabbitmq.sh operator VHOST USER                 dead letters: `orderbus dlq`
#
# TOPICS is a regular expression of the topics that the group may bind to, whole: 'orders\.placed|orders\.cancelled'. All, unless
# it is given. A service publishes nothing itself then (no bus.publish): its events go through the outbox and the relay.
#
# The password comes on stdin, one line, and never stands in an argument list of a process. Needs the rights to run rabbitmqctl;
# RABBITMQCTL names another program to run in its place (docker exec -i broker rabbitmqctl). It may be run again: rights and
# password are then set anew.
#
# What this can't keep apart: the exchanges and queues that all groups share (ob.…, where retries wait) are declared, written and read by each of
# them, and whoever may park a message may write to any queue by its name. Where that matters, sign (docs/security.md).
set -eu

usage() {
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
}

[ $# -ge 3 ] || usage
kind=$1 vhost=$2 user=$3
rabbitmqctl=${RABBITMQCTL:-rabbitmqctl}
shared='ob\.(events|return|lost|retry\.[0-9]+ms)'

case $kind in
    service)
        [ $# -ge 4 ] || usage
        own="$(printf '%s' "$4" | sed 's/[][\.*^$(){}?+|/]/\\&/g')\\..+"
        configure="^($shared|$own)\$"
        write="^(amq\\.default|ob\\.(return|lost|retry\\.[0-9]+ms)|$own)\$"
        read="^($shared|$own)\$"
        topics="^(${5:-.*})\\.[*0-9]+\$"
        ;;
    relay)
        configure="^$shared\$"
        write="^$shared\$"
        read="^$shared\$"
        ;;
    operator)
        configure='^$'
        write='^(amq\.default|.*\.dlq)$'
        read='^(ob\.lost|.*\.dlq)$'
        ;;
    *) usage ;;
esac

IFS= read -r password || true
[ -n "$password" ] || { echo "rabbitmq.sh: no password on stdin" >&2; exit 2; }

if $rabbitmqctl -q list_users --no-table-headers | cut -f1 | grep -qxF -- "$user"; then
    printf '%s\n' "$password" | $rabbitmqctl -q change_password "$user"
else
    printf '%s\n' "$password" | $rabbitmqctl -q add_user "$user"
fi
$rabbitmqctl -q set_permissions -p "$vhost" "$user" "$configure" "$write" "$read"
if [ "$kind" = service ]; then
    $rabbitmqctl -q set_topic_permissions -p "$vhost" "$user" ob.events '^$' "$topics"
fi
