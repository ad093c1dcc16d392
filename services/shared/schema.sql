-- The tables of the demo. Each service writes its own; `orders` is the order's own record, written by the API
-- (which places it) and by the aggregator (which finishes it).

create table if not exists orders (
    order_id uuid primary key,
    customer_id uuid not null,
    total_cents bigint not null check (total_cents >= 0),
    lines jsonb not null,
    status text not null default 'pending' check (status in ('pending', 'confirmed', 'cancelled')),
    reason text,
    placed_at timestamptz not null default clock_timestamp(),
    payment text,
    payment_at timestamptz,
    stock text,
    stock_at timestamptz,
    finished_at timestamptz
) with (fillfactor = 60);

create index if not exists orders_by_customer on orders (customer_id, placed_at desc, order_id desc);
create index if not exists orders_pending on orders (placed_at) where status = 'pending';

-- The truth of Idempotency-Key: a row in the order's own transaction. Redis only spares the way here.
create table if not exists idempotency_key (
    key text primary key,
    fingerprint text not null,
    order_id uuid not null,
    created_at timestamptz not null default now()
);

-- One row an order. `times` counts how often its effect was applied: anything but 1 is a doubled effect, and stays visible.
create table if not exists payment (
    order_id uuid primary key,
    state text not null check (state in ('authorized', 'declined', 'refunded', 'void')),
    amount_cents bigint not null default 0,
    reason text,
    times integer not null default 1,
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
    lines jsonb not null default '[]',
    reason text,
    times integer not null default 1,
    decided_at timestamptz not null default clock_timestamp()
) with (fillfactor = 80);
