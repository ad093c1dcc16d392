"""The shop's table. `python database.py` creates it, which a real shop leaves to its migrations."""

import asyncio
import os

from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "shop_order"
    number: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    cents: Mapped[int]
    is_paid: Mapped[bool] = mapped_column(default=False)


engine = create_async_engine(os.environ["ORDERBUS_DATABASE_URL"].replace("postgresql:", "postgresql+psycopg:"))


async def create_tables() -> None:
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(create_tables())
