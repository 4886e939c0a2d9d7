"""What the directory does inside Redis, where a script is one atomic change and one round trip.

Used by ``directory``. Each script has one key argument, the prefix of all keys of a cluster. Below it:

=================  =======  ====================================================================
``lease:WORKER``   string   the worker's record; expires with the lease
``blocks:WORKER``  set      keys of the blocks that it announced; expires with the lease
``known:WORKER``   string   the number up to which its changes are known; expires with the lease
``workers``        set      workers whose lease may hold; expires after KEEP_MS
``clock``          hash     when the workers were listed last, and from when on the list is settled;
                            expires after KEEP_MS
``marks``          string   the closed and the draining workers; stays
``state``          string   the desired state; stays
``events``         stream   the newest events; expires after EVENTS_MS
=================  =======  ====================================================================

Leases run on Redis's clock. ``allow-oom``: a Redis that is full refuses announcements of blocks and events,
and goes on with the rest, which is small.
"""

KEEP_MS = 3_600_000
EVENTS_MS = 7 * 24 * 3_600_000

RENEW = """#!lua flags=allow-oom
local prefix, worker, record, lease_ms, keep_ms = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
redis.call('SET', prefix .. 'lease:' .. worker, record, 'PX', lease_ms)
redis.call('PEXPIRE', prefix .. 'blocks:' .. worker, lease_ms)
redis.call('PEXPIRE', prefix .. 'known:' .. worker, lease_ms)
redis.call('SADD', prefix .. 'workers', worker)
redis.call('PEXPIRE', prefix .. 'workers', keep_ms)
"""

WITHDRAW = """#!lua flags=allow-oom
local prefix, worker = KEYS[1], ARGV[1]
for _, name in ipairs({'lease:', 'blocks:', 'known:'}) do
  redis.call('UNLINK', prefix .. name .. worker)
end
redis.call('SREM', prefix .. 'workers', worker)
"""

STORE = """#!lua flags=allow-oom
redis.call('SET', KEYS[1] .. ARGV[1], ARGV[2])
"""

LIST = """#!lua flags=allow-oom
-- Returns: whether the list is settled, the marks, the records.
local prefix, lease_ms, settle_ms, keep_ms = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local clock = redis.call('HMGET', prefix .. 'clock', 'listed', 'settles')
local listed_ms, settles_ms = tonumber(clock[1]), tonumber(clock[2])
-- No clock: Redis started empty. A gap: it hung, was away, holds an old copy, or its clock was set.
if not listed_ms or math.abs(now_ms - listed_ms) >= lease_ms then settles_ms = now_ms + settle_ms end
redis.call('HSET', prefix .. 'clock', 'listed', now_ms, 'settles', settles_ms)
redis.call('PEXPIRE', prefix .. 'clock', keep_ms)
local records = {}
for _, worker in ipairs(redis.call('SMEMBERS', prefix .. 'workers')) do
  local record = redis.call('GET', prefix .. 'lease:' .. worker)
  if record then
    records[#records + 1] = record
  else
    redis.call('SREM', prefix .. 'workers', worker)
  end
end
return {now_ms >= settles_ms and 1 or 0, redis.call('GET', prefix .. 'marks'), records}
"""

CLAIM = """#!lua flags=allow-oom
local prefix, keep_ms = KEYS[1], ARGV[1]
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('HSET', prefix .. 'clock', 'listed', now_ms, 'settles', now_ms)
redis.call('PEXPIRE', prefix .. 'clock', keep_ms)
"""

ANNOUNCE = """#!lua
-- One piece of an announcement. Returns `until` after the last piece, `since` after another; else the number
-- that is known.
local prefix, worker, since, till = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local first, last, most, added = ARGV[4] == '1', ARGV[5] == '1', tonumber(ARGV[6]), tonumber(ARGV[7])
local blocks, numbers = prefix .. 'blocks:' .. worker, prefix .. 'known:' .. worker
local left_ms = redis.call('PTTL', prefix .. 'lease:' .. worker)
if left_ms <= 0 then return 0 end
if since == 0 and first then redis.call('UNLINK', blocks, numbers) end
local known = tonumber(redis.call('GET', numbers) or 0)
if known ~= since then return known end
local function each(command, from, to)
  for begin = from, to, 1000 do
    redis.call(command, blocks, unpack(ARGV, begin, math.min(begin + 999, to)))
  end
end
each('SREM', 8 + added, #ARGV)
local room = most - redis.call('SCARD', blocks)
each('SADD', 8, 7 + math.min(added, room))
redis.call('PEXPIRE', blocks, left_ms)
if not last then return since end
redis.call('SET', numbers, till, 'PX', left_ms)
return till
"""

FIND = """#!lua flags=no-writes
-- Returns {worker, indices of the blocks that it has} for each worker that has one.
local prefix, found = KEYS[1], {}
for _, worker in ipairs(redis.call('SMEMBERS', prefix .. 'workers')) do
  local has = redis.call('SMISMEMBER', prefix .. 'blocks:' .. worker, unpack(ARGV))
  local hits = {worker}
  for index, one in ipairs(has) do
    if one == 1 then hits[#hits + 1] = index - 1 end
  end
  if #hits > 1 then found[#found + 1] = hits end
end
return found
"""

PUBLISH = """#!lua
local key, number, most, keep_ms = KEYS[1] .. 'events', ARGV[1], ARGV[2], ARGV[3]
local newest = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
if newest and tonumber(number) <= tonumber(string.match(newest[1], '^%d+')) then return end
redis.call('XADD', key, 'MAXLEN', most, number .. '-0', unpack(ARGV, 4))
redis.call('PEXPIRE', key, keep_ms)
"""
