-- What the shop written by hand needs beside the tables of the services.

create table outbox (
    id bigint generated always as identity primary key,
    event_id uuid not null,
    topic text not null,
    body bytea not null,
    created_at timestamptz not null default now()
) with (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000);

create table inbox (
    consumer text not null,
    event_id uuid not null,
    handled_at timestamptz not null default now(),
    primary key (consumer, event_id)
);

create index inbox_by_age on inbox using brin (handled_at);
