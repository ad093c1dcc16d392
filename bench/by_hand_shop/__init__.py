"""The six services of the demo as they are written without orderbus: FastStream, psycopg, redis-py and granian, and a transaction a message.

The same events over durable quorum queues, the same tables with the same meaning (services/shared/schema.sql), an outbox and an
inbox of their own (schema.sql here), and the same faults of the payment gateway, so that the demo's load and its audit fit both.
Each service is a process: `python -m bench.by_hand_shop.payment`, and so on; the API is `granian bench.by_hand_shop.orders_api:app`.
They read SHOP_BROKER_URL, SHOP_DATABASE_URL, SHOP_REDIS_URL and SHOP_REDIS_PREFIX.
"""
