"""The atomic steps of the queue on Redis, in Lua. Each names its KEYS and ARGV; redis_protocol.py explains the keys.

Workers and API processes of other versions run their own scripts on the same keys, so what is stored stays compatible.
"""

from __future__ import annotations

from typing import Final

# A counter that somebody overwrote with something else starts again from the amount added: no answer is lost over it.
_COUNTERS: Final = """
local function count(key)
  local value = redis.pcall('GET', key)
  return type(value) == 'string' and tonumber(value) or 0
end
local function add(key, amount)
  if amount == 0 then return end
  if type(redis.pcall('INCRBY', key, amount)) == 'table' then redis.call('SET', key, math.max(0, amount)) end
end
"""

# KEYS: both streams, tokens, epoch, seen. ARGV: epoch, stream (1 or 2), max jobs, max tokens, tokens, seen ttl,
# payloads… Adds one entry per payload, or none. Returns {1, entries…}, {0, jobs, tokens} if the queue is full, {-1} if
# the epoch is a different one.
SUBMIT: Final = (
    _COUNTERS
    + """
if redis.call('GET', KEYS[4]) ~= ARGV[1] then return {-1} end
local seen = redis.call('GET', KEYS[5])
local ids = {1}
if seen then
  for id in string.gmatch(seen, '%S+') do ids[#ids + 1] = id end
  return ids
end
local jobs = redis.call('XLEN', KEYS[1]) + redis.call('XLEN', KEYS[2])
local tokens = count(KEYS[3])
local count = #ARGV - 6
if jobs > 0 and (jobs + count > tonumber(ARGV[3]) or tokens + tonumber(ARGV[5]) > tonumber(ARGV[4])) then
  return {0, jobs, tokens}
end
local stream = KEYS[tonumber(ARGV[2])]
for i = 7, #ARGV do ids[#ids + 1] = redis.call('XADD', stream, '*', 'p', ARGV[i]) end
add(KEYS[3], tonumber(ARGV[5]))
redis.call('SET', KEYS[5], table.concat(ids, ' ', 2), 'PX', ARGV[6])
return ids
"""
)

# KEYS: both streams, tokens, done, replies. ARGV: group, replies ttl, message or '', what computed its answers or '',
# then stream, entry and tokens of each job. Deletes the entries, gives back the tokens of those that were still there,
# and sends the message. Returns how many were still there.
FINISH: Final = (
    _COUNTERS
    + """
local there, tokens = 0, 0
for i = 5, #ARGV, 3 do
  local stream = KEYS[tonumber(ARGV[i])]
  redis.call('XACK', stream, ARGV[1], ARGV[i + 1])
  if redis.call('XDEL', stream, ARGV[i + 1]) == 1 then
    there = there + 1
    tokens = tokens + tonumber(ARGV[i + 2])
  end
end
if there > 0 then
  add(KEYS[3], -tokens)
  add(KEYS[4], tokens)
  if redis.call('XLEN', KEYS[1]) + redis.call('XLEN', KEYS[2]) == 0 then redis.call('DEL', KEYS[3]) end
end
if ARGV[3] ~= '' then
  if type(redis.pcall('XADD', KEYS[5], '*', 'p', ARGV[3], 'v', ARGV[4])) == 'table' then
    -- Another kind of key is in its place, or its ids are exhausted.
    redis.call('DEL', KEYS[5])
    redis.call('XADD', KEYS[5], '*', 'p', ARGV[3], 'v', ARGV[4])
  end
  redis.call('PEXPIRE', KEYS[5], ARGV[2])
end
return there
"""
)

# Redis that is out of memory refuses commands that could use more, but in a script only as the first write. So scripts
# that must work then, and use no more than they free, begin with a write that is never refused.

# The consumer that released jobs are handed to. No worker is called so; every worker looks for them.
RELEASED: Final = "released"

# KEYS: both streams. ARGV: group, consumer, `released`, then stream, entry and deliveries of each job. Hands on those
# that are still the consumer's. They keep their entries, by which callers cancel them; this delivery does not count.
RELEASE: Final = """
for i = 4, #ARGV, 3 do
  local stream, id = KEYS[tonumber(ARGV[i])], ARGV[i + 1]
  if #redis.call('XPENDING', stream, ARGV[1], id, id, 1, ARGV[2]) == 1 then
    redis.call('XCLAIM', stream, ARGV[1], ARGV[3], 0, id, 'RETRYCOUNT', ARGV[i + 2] - 1, 'JUSTID')
  end
end
"""

# KEYS: both streams. ARGV: group, consumer, `released`, count. Takes at most `count` released jobs from each stream.
# Returns stream, entry, fields and deliveries of each.
TAKE_RELEASED: Final = """
local taken = {}
for number, stream in ipairs(KEYS) do
  for _, held in ipairs(redis.call('XPENDING', stream, ARGV[1], '-', '+', ARGV[4], ARGV[3])) do
    local entry = redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, held[1])[1]
    if entry then
      taken[#taken + 1] = {number, entry[1], entry[2], held[4] + 1}
    else
      redis.call('XACK', stream, ARGV[1], held[1])
    end
  end
end
return taken
"""

# KEYS: both streams. ARGV: group. Jobs that nobody holds would never be delivered if their ids are below the last
# delivered one, as after a failover to a Redis whose clock is behind. Moves the group back before the first of them.
REWIND: Final = """
for _, stream in ipairs(KEYS) do
  redis.call('XACK', stream, ARGV[1], '0-1')
  local pending, last = 0, nil
  for _, fields in ipairs(redis.call('XINFO', 'GROUPS', stream)) do
    local group = {}
    for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
    if group['name'] == ARGV[1] then pending, last = group['pending'], group['last-delivered-id'] end
  end
  local undelivered = redis.call('XLEN', stream) - pending
  -- If no id can be above `last`, XRANGE is an error, which has no elements either.
  if last and undelivered > 0 and #redis.pcall('XRANGE', stream, '(' .. last, '+', 'COUNT', 1) == 0 then
    local before, found = '0-0', false
    while not found do
      local entries = redis.call('XRANGE', stream, '(' .. before, '+', 'COUNT', 100)
      for _, entry in ipairs(entries) do
        found = #redis.call('XPENDING', stream, ARGV[1], entry[1], entry[1], 1) == 0
        if found then break end
        before = entry[1]
      end
      if #entries == 0 then break end
    end
    if found then redis.call('XGROUP', 'SETID', stream, ARGV[1], before) end
  end
end
"""

# KEYS: both streams. ARGV: group, milliseconds. Deletes the consumers that were silent for that long, because Redis
# creates them on reading and never removes them. Those with pending jobs stay: the jobs could not be claimed any more.
FORGET: Final = """
for _, stream in ipairs(KEYS) do
  for _, fields in ipairs(redis.call('XINFO', 'CONSUMERS', stream, ARGV[1])) do
    local consumer = {}
    for i = 1, #fields, 2 do consumer[fields[i]] = fields[i + 1] end
    if consumer['pending'] == 0 and consumer['idle'] > tonumber(ARGV[2]) then
      redis.pcall('XGROUP', 'DELCONSUMER', stream, ARGV[1], consumer['name'])
    end
  end
end
"""

# KEYS: both streams. ARGV: stream and entry of each job. Returns the indices, from 0, of those that are gone.
GONE: Final = """
local gone = {}
for i = 1, #ARGV, 2 do
  local stream, id = KEYS[tonumber(ARGV[i])], ARGV[i + 1]
  if #redis.call('XRANGE', stream, id, id) == 0 then gone[#gone + 1] = (i - 1) / 2 end
end
return gone
"""

# KEYS: both streams. ARGV: group, consumer, then stream and entry of each job. Renews the leases that are still the
# consumer's.
RENEW: Final = """
for i = 3, #ARGV, 2 do
  local stream, id = KEYS[tonumber(ARGV[i])], ARGV[i + 1]
  if #redis.call('XPENDING', stream, ARGV[1], id, id, 1, ARGV[2]) == 1 then
    redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, id, 'JUSTID')
  end
end
"""

# KEYS: workers, infos, variants. ARGV: worker, its info, what computes its answers or '', seconds after which other
# workers are forgotten. Stamps a heartbeat with Redis' time. Heartbeats from the future are stale too: Redis' clock was
# set back, or another machine took over.
BEAT: Final = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
redis.call('HSET', KEYS[3], ARGV[1], ARGV[3])
redis.call('EXPIRE', KEYS[3], ARGV[4])
for _, range in ipairs({{'-inf', now - ARGV[4]}, {now + ARGV[4], '+inf'}}) do
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], range[1], range[2])) do
    redis.call('ZREM', KEYS[1], worker)
    redis.call('HDEL', KEYS[2], worker)
    redis.call('HDEL', KEYS[3], worker)
  end
end
"""

# KEYS: workers, infos, variants. ARGV: seconds for which a heartbeat counts. Returns, in turn, the info of each live
# worker and what computes its answers or ''.
ALIVE: Final = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local alive = {}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now - ARGV[1], now + ARGV[1])) do
  local info = redis.call('HGET', KEYS[2], worker)
  if info then
    alive[#alive + 1] = info
    alive[#alive + 1] = redis.call('HGET', KEYS[3], worker) or ''
  end
end
return alive
"""
