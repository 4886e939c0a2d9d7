"""What the directory does inside Redis, where a script is one atomic change and one round trip.

Used by ``directory``. Each script has one key argument, the prefix of all keys of a cluster. Below it:

=================  =======  ====================================================================
``lease:WORKER``   string   the worker's record; expires with the lease
``known:WORKER``   string   the number up to which its changes are known; expires with the lease
``blocks:WORKER``  set      keys of the blocks that it announced
``holders``        hash     key of a block -> the workers that announced it, one a line
``workers``        set      workers whose lease may hold, or whose blocks are not removed yet
``clock``          hash     when the workers were listed last, and from when on the list is settled
``marks``          string   the closed and the draining workers; stays
``state``          string   the desired state; stays
``revision``       string   the state's number, which rises with each change; stays
``events``         stream   the newest events; expires after EVENTS_MS
=================  =======  ====================================================================

Keys without another word expire KEEP_MS after the last use. A look-up reads ``holders`` and asks which of
those are ``known``, so it costs the same for any number of workers. The blocks of a worker whose lease ran
out are removed by the calls that list, SWEEP_BLOCKS at a time.

Leases run on Redis's clock. ``allow-oom``: a Redis that is full refuses announcements of blocks and events,
and goes on with the rest, which is small.
"""

KEEP_MS = 3_600_000
EVENTS_MS = 7 * 24 * 3_600_000
SWEEP_BLOCKS = 500
"""Redis serves no other call for a few milliseconds meanwhile."""

_DROP = """
local function drop(prefix, worker, block)
  local left = {}
  for holder in string.gmatch(redis.call('HGET', prefix .. 'holders', block) or '', '[^\\n]+') do
    if holder ~= worker then left[#left + 1] = holder end
  end
  if #left == 0 then
    redis.call('HDEL', prefix .. 'holders', block)
  else
    redis.call('HSET', prefix .. 'holders', block, table.concat(left, '\\n'))
  end
end
-- Removes `most` of a worker's blocks. Returns how many are removed.
local function sweep(prefix, worker, most)
  local blocks = redis.call('SPOP', prefix .. 'blocks:' .. worker, most)
  for _, block in ipairs(blocks) do drop(prefix, worker, block) end
  return #blocks
end
"""

RENEW = """#!lua flags=allow-oom
local prefix, worker, record, lease_ms, keep_ms = KEYS[1], ARGV[1], ARGV[2], ARGV[3], ARGV[4]
redis.call('SET', prefix .. 'lease:' .. worker, record, 'PX', lease_ms)
redis.call('PEXPIRE', prefix .. 'known:' .. worker, lease_ms)
redis.call('SADD', prefix .. 'workers', worker)
for _, name in ipairs({'blocks:' .. worker, 'holders', 'workers'}) do
  redis.call('PEXPIRE', prefix .. name, keep_ms)
end
"""

WITHDRAW = """#!lua flags=allow-oom
redis.call('UNLINK', KEYS[1] .. 'lease:' .. ARGV[1], KEYS[1] .. 'known:' .. ARGV[1])
"""

MARK = """#!lua flags=allow-oom
redis.call('SET', KEYS[1] .. 'marks', ARGV[1])
"""

STORE_STATE = """#!lua flags=allow-oom
-- Stores the desired state, unless one with its number or a higher one is there. Returns the number that is
-- there then.
local state, revision = KEYS[1] .. 'state', KEYS[1] .. 'revision'
local stored, new = tonumber(redis.call('GET', revision) or 0), tonumber(ARGV[2])
if stored >= new then return stored end
redis.call('SET', state, ARGV[1])
redis.call('SET', revision, ARGV[2])
return new
"""

LIST = f"""#!lua flags=allow-oom
{_DROP}
-- Returns: whether the list is settled, the marks, the records, the desired state's number, the newest
-- event's.
local prefix, lease_ms, settle_ms, keep_ms = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
local room = {SWEEP_BLOCKS}
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local clock = redis.call('HMGET', prefix .. 'clock', 'listed', 'settles')
local listed_ms, settles_ms = tonumber(clock[1]), tonumber(clock[2])
-- No clock: Redis started empty. A gap: it hung, was away, holds an old copy, or its clock was set.
if not listed_ms or math.abs(now_ms - listed_ms) >= lease_ms then settles_ms = now_ms + settle_ms end
redis.call('HSET', prefix .. 'clock', 'listed', now_ms, 'settles', settles_ms)
redis.call('PEXPIRE', prefix .. 'clock', keep_ms)
local records = {{}}
for _, worker in ipairs(redis.call('SMEMBERS', prefix .. 'workers')) do
  local record = redis.call('GET', prefix .. 'lease:' .. worker)
  if record then
    records[#records + 1] = record
  else
    room = room - sweep(prefix, worker, room)
    if room > 0 then redis.call('SREM', prefix .. 'workers', worker) end
  end
end
local revision = tonumber(redis.call('GET', prefix .. 'revision') or 0)
local newest = redis.call('XREVRANGE', prefix .. 'events', '+', '-', 'COUNT', 1)[1]
local event = newest and tonumber(string.match(newest[1], '^%d+')) or 0
return {{now_ms >= settles_ms and 1 or 0, redis.call('GET', prefix .. 'marks'), records, revision, event}}
"""

CLAIM = """#!lua flags=allow-oom
local prefix, keep_ms = KEYS[1], ARGV[1]
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
redis.call('HSET', prefix .. 'clock', 'listed', now_ms, 'settles', now_ms)
redis.call('PEXPIRE', prefix .. 'clock', keep_ms)
"""

ANNOUNCE = f"""#!lua
{_DROP}
-- One piece of an announcement. Returns `until` after the last piece, `since` after another; else the number
-- that is known; -1 to be called again, since there are more old blocks to remove.
local prefix, worker, since, till = KEYS[1], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local first, last, most, added = ARGV[4] == '1', ARGV[5] == '1', tonumber(ARGV[6]), tonumber(ARGV[7])
local keep_ms, holders = ARGV[8], prefix .. 'holders'
local blocks, numbers = prefix .. 'blocks:' .. worker, prefix .. 'known:' .. worker
local left_ms = redis.call('PTTL', prefix .. 'lease:' .. worker)
if left_ms <= 0 then return 0 end
if since == 0 and first then
  redis.call('DEL', numbers)
  if sweep(prefix, worker, {SWEEP_BLOCKS}) == {SWEEP_BLOCKS} then return -1 end
end
local known = tonumber(redis.call('GET', numbers) or 0)
if known ~= since then return known end
for at = 9 + added, #ARGV do
  if redis.call('SREM', blocks, ARGV[at]) == 1 then drop(prefix, worker, ARGV[at]) end
end
local room = most - redis.call('SCARD', blocks)
for at = 9, 8 + math.min(added, room) do
  if redis.call('SADD', blocks, ARGV[at]) == 1 then
    local others = redis.call('HGET', holders, ARGV[at])
    redis.call('HSET', holders, ARGV[at], others and others .. '\\n' .. worker or worker)
  end
end
redis.call('PEXPIRE', blocks, keep_ms)
redis.call('PEXPIRE', holders, keep_ms)
if not last then return since end
redis.call('SET', numbers, till, 'PX', left_ms)
return till
"""

FIND = """#!lua flags=no-writes
-- Returns, for each block, the workers with a lease that have it, one a line.
local found, known = {}, {}
for at, text in ipairs(redis.call('HMGET', KEYS[1] .. 'holders', unpack(ARGV))) do
  local live = {}
  for worker in string.gmatch(text or '', '[^\\n]+') do
    if known[worker] == nil then
      known[worker] = redis.call('EXISTS', KEYS[1] .. 'known:' .. worker) == 1
    end
    if known[worker] then live[#live + 1] = worker end
  end
  found[at] = table.concat(live, '\\n')
end
return found
"""

PUBLISH = """#!lua
-- Events, oldest first: of each its number, then `fields` names and values.
local key, most, keep_ms, fields = KEYS[1] .. 'events', ARGV[1], ARGV[2], tonumber(ARGV[3])
local newest = redis.call('XREVRANGE', key, '+', '-', 'COUNT', 1)[1]
local known = newest and tonumber(string.match(newest[1], '^%d+')) or 0
for at = 4, #ARGV, fields + 1 do
  if tonumber(ARGV[at]) > known then
    redis.call('XADD', key, 'MAXLEN', most, ARGV[at] .. '-0', unpack(ARGV, at + 1, at + fields))
  end
end
redis.call('PEXPIRE', key, keep_ms)
"""
