"""What a user would pick instead, measured beside Holdfast in the same run.

Three designs, each in its best form that is still durable when it says so:

* ``postgres_redis``: PostgreSQL 15 and a Redis 7 cache, written through (asyncpg, redis-py);
* ``redis_always``: Redis 7 alone, ``appendonly yes`` and ``appendfsync always`` (redis-py with hiredis);
* ``sqlite_dict``: SQLite in this process (WAL, ``synchronous=FULL``) behind an ordered dict that forgets the oldest.

The servers are those of the distribution, run on loopback in temporary directories while a benchmark lasts.  Nothing
of the machine is touched: no service is started, no file of theirs is read.  What is not installed is left out, with
a line that says what to install.
"""
