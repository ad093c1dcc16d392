-- Roles with few rights for orderbus: psql -X -v ON_ERROR_STOP=1 -d DATABASE -v NAME=VALUE … -f postgres.sql
--
--   owner=NAME     owns the schema orderbus: runs `orderbus schema apply` at each upgrade, `orderbus schema upkeep` each day
--   service=NAME   a service's handlers: inbox, own events into the outbox, and a schema of its own, named as the role
--   relay=NAME     publishes the outbox (a bus without handlers; the services then run with ORDERBUS_RELAY=false)
--   operator=NAME  looks at everything, retries and discards what is stuck: `orderbus outbox`, `orderbus explain`
--
-- Each name has a password beside it: owner_password, service_password, relay_password, operator_password. To keep them out of the
-- process list, write `\set service_password …` lines into a file that only you can read, and give it first: -f passwords.sql.
--
-- `owner` is required, the others are optional; run it once for each service. As a superuser, or as a role that may create roles
-- and owns the database. It may be run again, and has to be: first it makes the roles and the schema; then the owner runs
-- `orderbus schema apply`; then, and after each upgrade, it grants the rights on the tables.

\set ON_ERROR_STOP 1
\if :{?owner}
\else
    do $$ begin raise 'postgres.sql needs -v owner=NAME'; end $$;
\endif
\if :{?owner_password}
\else
    \set owner_password ''
\endif
\if :{?service}
\else
    \set service ''
\endif
\if :{?service_password}
\else
    \set service_password ''
\endif
\if :{?relay}
\else
    \set relay ''
\endif
\if :{?relay_password}
\else
    \set relay_password ''
\endif
\if :{?operator}
\else
    \set operator ''
\endif
\if :{?operator_password}
\else
    \set operator_password ''
\endif

begin;
set local client_min_messages = warning;

create temporary table wanted (kind text, name text, password text) on commit drop;
insert into wanted
select * from (values
    ('owner', :'owner', :'owner_password'), ('service', :'service', :'service_password'),
    ('relay', :'relay', :'relay_password'), ('operator', :'operator', :'operator_password')
) given (kind, name, password) where name <> '';

select format('create role %I', name) from wanted where not exists (select from pg_roles where rolname = name) \gexec
select format('alter role %I login nosuperuser nocreatedb nocreaterole noreplication nobypassrls', name) from wanted \gexec
select format('alter role %I password %L', name, password) from wanted where password <> '' \gexec
select format('grant connect on database %I to %I', current_database(), name) from wanted \gexec

select format('grant create on database %I to %I', current_database(), :'owner') \gexec
select format('grant %I to current_user', :'owner') where not pg_has_role(current_user, :'owner', 'member') \gexec
create schema if not exists orderbus authorization :"owner";
revoke all on schema orderbus from public;
select format('grant usage on schema orderbus to %I', name) from wanted where kind <> 'owner' \gexec

select format('grant %I to current_user', name) from wanted where kind = 'service' and not pg_has_role(current_user, name, 'member') \gexec
select format('create schema if not exists %I authorization %I', name, name) from wanted where kind = 'service' \gexec

select to_regclass('orderbus.outbox') is not null as has_tables \gset
\if :has_tables
create temporary table may (kind text, rights text, object text) on commit drop;
insert into may values
    ('service', 'select', 'schema_version'),
    ('service', 'select, insert, update (window_s, seen_at)', 'consumer'),
    ('service', 'select, insert, delete', 'inbox'),
    ('service', 'insert', 'outbox'),
    ('service', 'insert', 'scheduled'),
    ('service', 'usage', 'sequence'),
    ('relay', 'select', 'schema_version'),
    ('relay', 'select, insert, delete', 'outbox'),
    ('relay', 'select, update, delete', 'scheduled'),
    ('relay', 'select, insert, update, delete', 'stuck'),
    ('relay', 'select, insert, update, delete', 'relay'),
    ('relay', 'select, insert, update, delete', 'lease'),
    ('relay', 'select, usage', 'sequence'),
    ('operator', 'select', 'schema_version'),
    ('operator', 'select', 'consumer'),
    ('operator', 'select', 'inbox'),
    ('operator', 'select', 'outbox'),
    ('operator', 'select', 'relay'),
    ('operator', 'select', 'lease'),
    ('operator', 'select, update, delete', 'scheduled'),
    ('operator', 'select, update, delete', 'stuck');
select format('revoke all on all tables in schema orderbus from %I', name) from wanted where kind <> 'owner' \gexec
select format('revoke all on all sequences in schema orderbus from %I', name) from wanted where kind <> 'owner' \gexec
select format(case object when 'sequence' then 'grant %s on sequence orderbus.outbox_id_seq to %I'
        else 'grant %s on orderbus.' || object || ' to %I' end, rights, name) from wanted join may using (kind) \gexec
\else
\warn 'The roles are there. Now let the owner run `orderbus schema apply`, then run this file again for the rights on the tables.'
\endif
commit;
