"""The atomic steps of the queue on Redis, in Lua: each names its KEYS and ARGV; see redis_protocol.py for the keys."""

from __future__ import annotations

from typing import Final

# Counters of ours. One that somebody has overwritten with something else begins anew: no answer is lost over it.
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

# KEYS: both lanes, tokens, epoch, seen. ARGV: epoch, lane (1 or 2), max jobs, max tokens, tokens, seen ttl, payloads…
# Returns {1, entry ids…}, {0, jobs, tokens} when full, {-1} when the epoch is another.
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
local lane = KEYS[tonumber(ARGV[2])]
for i = 7, #ARGV do ids[#ids + 1] = redis.call('XADD', lane, '*', 'p', ARGV[i]) end
add(KEYS[3], tonumber(ARGV[5]))
redis.call('SET', KEYS[5], table.concat(ids, ' ', 2), 'PX', ARGV[6])
return ids
"""
)

# KEYS: both lanes, tokens, done, replies. ARGV: group, replies ttl, message or '', then lane, entry, tokens for each
# job. Deletes the entries; those already gone count for nothing. Sends the message. Returns how many were still there.
FINISH: Final = (
    _COUNTERS
    + """
local there, tokens = 0, 0
for i = 4, #ARGV, 3 do
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
  redis.call('XADD', KEYS[5], '*', 'p', ARGV[3])
  redis.call('PEXPIRE', KEYS[5], ARGV[2])
end
return there
"""
)

# KEYS: both lanes. ARGV: group, then lane and entry for each job. Puts each that is still there at its lane's end anew.
RELEASE: Final = """
for i = 2, #ARGV, 2 do
  local stream = KEYS[tonumber(ARGV[i])]
  local entry = redis.call('XRANGE', stream, ARGV[i + 1], ARGV[i + 1])[1]
  redis.call('XACK', stream, ARGV[1], ARGV[i + 1])
  if entry then
    redis.call('XDEL', stream, ARGV[i + 1])
    redis.call('XADD', stream, '*', unpack(entry[2]))
  end
end
"""

# KEYS: both lanes. ARGV: lane and entry for each job. Returns the positions (from 0) of those that are gone.
GONE: Final = """
local gone = {}
for i = 1, #ARGV, 2 do
  local stream, id = KEYS[tonumber(ARGV[i])], ARGV[i + 1]
  if #redis.call('XRANGE', stream, id, id) == 0 then gone[#gone + 1] = (i - 1) / 2 end
end
return gone
"""

# KEYS: both lanes. ARGV: group, consumer, then lane and entry for each job. Renews the lease of those still its own.
RENEW: Final = """
for i = 3, #ARGV, 2 do
  local stream, id = KEYS[tonumber(ARGV[i])], ARGV[i + 1]
  if #redis.call('XPENDING', stream, ARGV[1], id, id, 1, ARGV[2]) == 1 then
    redis.call('XCLAIM', stream, ARGV[1], ARGV[2], 0, id, 'JUSTID')
  end
end
"""

# KEYS: workers, infos. ARGV: worker, what it says of itself, seconds after which others are forgotten. Stamps a
# heartbeat with Redis' time. One from the future is of a clock that has been set back, or of another machine's.
BEAT: Final = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
redis.call('ZADD', KEYS[1], now, ARGV[1])
redis.call('HSET', KEYS[2], ARGV[1], ARGV[2])
for _, range in ipairs({{'-inf', now - ARGV[3]}, {now + ARGV[3], '+inf'}}) do
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], range[1], range[2])) do
    redis.call('ZREM', KEYS[1], worker)
    redis.call('HDEL', KEYS[2], worker)
  end
end
"""

# KEYS: workers, infos. ARGV: seconds that a heartbeat counts. Returns what each worker that is there says of itself.
ALIVE: Final = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local alive = {}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], now - ARGV[1], now + ARGV[1])) do
  local info = redis.call('HGET', KEYS[2], worker)
  if info then alive[#alive + 1] = info end
end
return alive
"""
