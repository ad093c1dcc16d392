-- What the demo's services may do with the demo's tables, beside what postgres.sql gives each of them:
--
--   psql -X -v ON_ERROR_STOP=1 -d DATABASE -v orders_api=NAME -v payment=NAME -v inventory=NAME -v aggregator=NAME -f demo.sql
--
-- As the owner of the tables, after `python -m services.shared.database`. It may be run again. `for update` needs the right to update.
\set ON_ERROR_STOP 1
begin;
revoke all on orders, idempotency_key, payment, stock, reservation from public;
grant select, insert on orders to :"orders_api";
grant select, insert, update, delete on idempotency_key to :"orders_api";
grant select, insert, update on payment to :"payment";
grant select, update on stock to :"inventory";
grant select, insert, update on reservation to :"inventory";
grant select, update on orders to :"aggregator";
commit;
