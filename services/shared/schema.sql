-- The tables of the demo. Each service writes its own; `orders` is the order's own record, written by the API
-- (which places it) and by the aggregator (which finishes it). Run again, this brings an older database up to date.

create table if not exists orders (
    order_id uuid primary key,
    customer_id uuid not null,
    total_cents bigint not null check (total_cents >= 0),
    lines jsonb not null,
    status text not null default 'pending' check (status in ('pending', 'confirmed', 'cancelled')),
    reason text,
    placed_at timestamptz not null default clock_timestamp(),
    payment text check (payment in ('authorized', 'declined')),
    payment_at timestamptz,
    stock text check (stock in ('reserved', 'rejected')),
    stock_at timestamptz,
    finished_at timestamptz,
    stored_at timestamptz not null default now()
) with (fillfactor = 60);

-- `placed_at` is by the API's clock, `stored_at` by this one, to which the deadline is kept.
alter table orders add column if not exists stored_at timestamptz not null default now();

create index if not exists orders_by_customer on orders (customer_id, placed_at desc, order_id desc);
create index if not exists orders_pending_stored_at on orders (stored_at) where status = 'pending';
drop index if exists orders_pending;

-- The truth of Idempotency-Key: a row in the order's own transaction. Redis only spares the way here.
create table if not exists idempotency_key (
    key text primary key,
    fingerprint text not null,
    order_id uuid not null,
    created_at timestamptz not null default now()
);

-- No block range index: rows that are deleted make room for new ones, and a range that has once held an old row stays one of
-- old rows, so that after a day all of the table would be read for what is to be forgotten.
create index if not exists idempotency_key_created_at on idempotency_key (created_at);
drop index if exists idempotency_key_by_age;

-- `payment` and `reservation` have one row an order. `times` counts how often its OrderPlaced was applied, `reversals`
-- how often its OrderCancelled was: more than 1 is a doubled effect, and stays visible. A cancellation that comes first
-- leaves a tombstone: 'void', for which nothing is charged and nothing reserved any more.

create table if not exists payment (
    order_id uuid primary key,
    state text not null check (state in ('authorized', 'declined', 'refunded', 'void')),
    amount_cents bigint not null default 0,
    reason text,
    times integer not null default 1,
    reversals integer not null default 0,
    decided_at timestamptz not null default clock_timestamp()
) with (fillfactor = 80);

create table if not exists stock (
    sku text primary key,
    initial integer not null check (initial >= 0),
    available integer not null check (available >= 0)
) with (fillfactor = 20);

create table if not exists reservation (
    order_id uuid primary key,
    state text not null check (state in ('held', 'rejected', 'released', 'void')),
    pieces jsonb not null default '{}',
    sku text,
    reason text,
    times integer not null default 1,
    reversals integer not null default 0,
    decided_at timestamptz not null default clock_timestamp()
) with (fillfactor = 80);

-- By default vacuum waits until a fifth of a table is dead, and what looks for pending orders every second reads over the dead entries
-- of `orders_pending_stored_at` until then. By count, that does not grow with the table.
alter table orders set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 50000);
alter table idempotency_key set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 50000);
alter table payment set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 50000);
alter table reservation set (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 50000,
    autovacuum_vacuum_insert_scale_factor = 0, autovacuum_vacuum_insert_threshold = 50000);
