-- The outbox: events of committed transactions, until the broker has confirmed them. Rows are deleted, not marked.
-- CACHE 1: with a larger cache, ids would no longer follow the order in which transactions that wait for each other commit.
create sequence orderbus.outbox_id_seq as bigint cache 1;

create table orderbus.outbox (
    id           bigint      not null default nextval('orderbus.outbox_id_seq') primary key,
    bucket       smallint    not null,
    event_id     uuid        not null,
    topic        text        not null,
    key          text,
    body         bytea       not null,
    content_type text        not null,
    headers      json        not null,
    unrouted     text        not null,
    created_at   timestamptz not null default now()
) with (
    -- It is short and churns: vacuum by count, without pauses.
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 10000,
    autovacuum_vacuum_cost_delay = 0,
    autovacuum_analyze_scale_factor = 0,
    autovacuum_analyze_threshold = 10000
);
alter sequence orderbus.outbox_id_seq owned by orderbus.outbox.id;

-- Events held back until due_at; they move to the outbox then, and get their place in it then.
create table orderbus.scheduled (
    id           bigint      generated always as identity primary key,
    due_at       timestamptz not null,
    bucket       smallint    not null,
    event_id     uuid        not null,
    topic        text        not null,
    key          text,
    body         bytea       not null,
    content_type text        not null,
    headers      json        not null,
    unrouted     text        not null,
    created_at   timestamptz not null default now()
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);
create index scheduled_due_at on orderbus.scheduled (due_at, id);

-- Events that can't be published now, and (is_behind) later events of their keys, which may not overtake them.
create table orderbus.stuck (
    id           bigint      not null primary key,
    bucket       smallint    not null,
    event_id     uuid        not null,
    topic        text        not null,
    key          text,
    body         bytea       not null,
    content_type text        not null,
    headers      json        not null,
    unrouted     text        not null,
    created_at   timestamptz not null,
    reason       text        not null,
    attempts     integer     not null,
    first_at     timestamptz not null,
    last_at      timestamptz not null,
    next_try_at  timestamptz,
    is_behind    boolean     not null
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02);
create index stuck_key on orderbus.stuck (key, id) where key is not null;
create index stuck_next_try_at on orderbus.stuck (next_try_at, id) where next_try_at is not null;

-- Relays that are alive, and which of the 64 buckets each of them holds.
create table orderbus.relay (
    owner   text        not null primary key,
    seen_at timestamptz not null
);

create table orderbus.lease (
    bucket smallint    not null primary key,
    owner  text        not null,
    until  timestamptz not null
);

-- Numbers for handlers' names, so that an inbox row stays short; and for how long each needs its rows, told again every hour.
create table orderbus.consumer (
    id       integer          generated always as identity primary key,
    name     text             not null unique,
    window_s double precision,
    seen_at  timestamptz      not null default now()
);

-- Which consumer has handled which event. Partitioned by the day in the event's id (UUIDv7); ids of other kinds and days
-- without a partition go to the default one.
create table orderbus.inbox (
    event_id   uuid        not null,
    consumer   integer     not null,
    body_hash  bigint      not null,
    handled_at timestamptz not null default now(),
    primary key (event_id, consumer)
) partition by range (event_id);
create index inbox_handled_at on orderbus.inbox using brin (handled_at) with (autosummarize = on);

create table orderbus.inbox_default partition of orderbus.inbox default;
-- Rows are deleted from it, and others take their place: what BRIN knows of a range of blocks only ever widens.
create index inbox_default_handled_at_btree on orderbus.inbox_default (handled_at);
