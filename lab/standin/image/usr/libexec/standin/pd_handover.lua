-- Prefill, then decode (contract 5.4): one token from prefill in a subrequest, its
-- kv_transfer_params into the original body, which then goes to a decode server.
--
-- With pd_score_balance it also chooses the servers. What is in flight is counted in a shared
-- dictionary: at the choice in the access phase, back when prefill has answered, and at the latest
-- in the log phase, which runs for every request, also for one whose client has hung up.

local balancer = require("ngx.balancer")

local M = {}
local counts = ngx.shared.pd_score
local peers = {} -- side → list of {host, port}; only for a side with pd_score_balance
local decode_limit -- active requests of one decode server
local omni -- what the omni proxy was told; nil in the global proxy

-- servers: {prefill = {"host:port", …} or nil, decode = … or nil}
function M.configure(servers, limit)
    decode_limit = limit
    for side, list in pairs(servers) do
        peers[side] = {}
        for index, server in ipairs(list) do
            local host, port = server:match("^(.*):(%d+)$")
            peers[side][index] = { host = host, port = tonumber(port) }
        end
    end
end

-- options: policy, limits of active requests of one server (prefill, decode), and whether
-- max_completion_tokens is handled. Unlike the global proxy, the omni proxy waits for room.
function M.configure_omni(servers, options)
    omni = options
    M.configure(servers, options.decode)
end

local function key(what, side, index)
    return what .. ":" .. side .. ":" .. index
end

-- The workers choose one after the other, so that a burst spreads as in upstream's shared memory.
-- A worker that dies inside holds the lock for 0.1 s.
local function locked(action, ...)
    while not counts:add("lock", true, 0.1) do end
    local result = action(...)
    counts:delete("lock")
    return result
end

-- The server with the fewest bytes in flight, of equal ones the first; nil if none has room.
local function least(side, limit)
    local best, fewest
    for index = 1, #peers[side] do
        local bytes = counts:get(key("bytes", side, index)) or 0
        local active = counts:get(key("active", side, index)) or 0
        if active < limit and (not fewest or bytes < fewest) then
            best, fewest = index, bytes
        end
    end
    return best
end

local function take(side, bytes, limit)
    local index = least(side, limit)
    if index then
        counts:incr(key("bytes", side, index), bytes, 0)
        counts:incr(key("active", side, index), 1, 0)
    end
    return index
end

local function choose(side, limit)
    if not peers[side] then
        return
    end
    local bytes = tonumber(ngx.var.request_length)
    local index = locked(take, side, bytes, limit)
    while omni and not index do
        ngx.sleep(0.01)
        index = locked(take, side, bytes, limit)
    end
    ngx.ctx[side] = index and { index = index, bytes = bytes }
end

local function release(side)
    local choice = ngx.ctx[side]
    if choice then
        ngx.ctx[side] = nil
        counts:incr(key("bytes", side, choice.index), -choice.bytes)
        counts:incr(key("active", side, choice.index), -1)
    end
end

-- balancer phase: without a choice (every decode server is at its limit) nginx goes round robin.
function M.balance(side)
    local choice = ngx.ctx[side]
    if choice then
        local peer = peers[side][choice.index]
        assert(balancer.set_current_peer(peer.host, peer.port))
    end
end

-- access phase of what goes to prefill alone.
function M.to_prefill()
    choose("prefill", math.huge)
end

-- access phase of what goes to decode alone.
function M.to_decode()
    choose("decode", math.huge)
end

-- log phase.
function M.finish()
    release("prefill")
    release("decode")
end

local function set_request_id()
    if ngx.req.get_headers()["x-request-id"] then
        return
    end
    local file = io.open("/proc/sys/kernel/random/uuid")
    ngx.req.set_header("X-Request-Id", file:read("*l"))
    file:close()
end

local function read_body()
    ngx.req.read_body()
    local data = ngx.req.get_body_data()
    local path = not data and ngx.req.get_body_file()
    if path then
        local file = io.open(path, "rb")
        data = file:read("*a")
        file:close()
    end
    return data or ""
end

local function insert_at_end(body, member)
    local comma = body:match("^%s*{%s*}%s*$") and "" or ","
    local head = body:match("^(.*)}")
    return head and head .. comma .. member .. "}" or body
end

-- Like upstream it works on the text: the first such key wins; max_completion_tokens is untouched,
-- except by newer omni proxies.
local function prefill_body(body)
    body = body:gsub(',?%s*"stream_options"%s*:%s*%b{}', "", 1)
    body = body:gsub('("stream"%s*:%s*)%a+', "%1false", 1)
    local found
    body, found = body:gsub('("max_tokens"%s*:%s*)[^,}%s]+', "%11", 1)
    if omni and omni.handles_completion_tokens then
        body = body:gsub('("max_completion_tokens"%s*:%s*)[^,}%s]+', "%11", 1)
    end
    return found > 0 and body or insert_at_end(body, '"max_tokens":1')
end

local function pass_on(answer)
    ngx.status = answer.status
    ngx.header["Content-Type"] = answer.header["Content-Type"]
    ngx.print(answer.body)
    ngx.exit(ngx.HTTP_OK)
end

local function ask_prefill(body)
    choose("prefill", omni and omni.prefill or math.huge)
    -- The subrequest's balancer reads the choice from the same context.
    local answer = ngx.location.capture("/prefill_internal" .. ngx.var.uri, {
        method = ngx.HTTP_POST,
        body = prefill_body(body),
        ctx = ngx.ctx,
    })
    release("prefill")
    return answer
end

-- access phase of a completion.
function M.hand_over()
    set_request_id()
    local body = read_body()
    if omni and omni.policy == "aggregation" then
        return choose("decode", decode_limit)
    end
    local answer = ask_prefill(body)
    if omni and omni.policy == "parallel" then -- decode waits for nothing that prefill says
        return choose("decode", decode_limit)
    end
    if answer.status >= 300 then
        return pass_on(answer)
    end
    -- Without parameters (prefill's only token ended the answer) decode computes by itself.
    local parameters = answer.body:match('"kv_transfer_params"%s*:%s*(%b{})')
    if parameters then
        body = insert_at_end(body, '"kv_transfer_params":' .. parameters)
    end
    ngx.req.set_body_data(body)
    choose("decode", decode_limit)
end

local function ask_all(path, method)
    local requests, asked = {}, {}
    for _, side in ipairs({ "prefill", "decode" }) do
        for _, peer in ipairs(peers[side]) do
            local name = peer.host .. ":" .. peer.port
            requests[#requests + 1] = { "/backend_internal/" .. name .. path, { method = method } }
            asked[#asked + 1] = { side = side, name = name }
        end
    end
    return asked, { ngx.location.capture_multi(requests) }
end

-- content phase: ask every server the same; 200 only if all answer 200.
function M.broadcast(path, method)
    ngx.req.read_body()
    local asked, answers = ask_all(path, method or ngx.HTTP_GET)
    local parts, status = {}, 200
    for index, answer in ipairs(answers) do
        local worked = answer.status == 200
        status = worked and status or 503
        local head = string.format(
            "# %s %s: %d", asked[index].side, asked[index].name, answer.status
        )
        parts[#parts + 1] = head .. "\n" .. (worked and answer.body or "")
    end
    ngx.status = status
    ngx.header["Content-Type"] = "text/plain"
    ngx.say(table.concat(parts, "\n"))
end

-- content phase: what the servers' health is; the status is 200 whatever it is.
function M.health()
    local asked, answers = ask_all("/health", ngx.HTTP_GET)
    local parts, healthy = {}, true
    for index, answer in ipairs(answers) do
        local up = answer.status == 200
        healthy = healthy and up
        parts[index] = string.format(
            '{"endpoint": "%s", "role": "%s", "healthy": %s}',
            asked[index].name, asked[index].side, tostring(up)
        )
    end
    ngx.header["Content-Type"] = "application/json"
    ngx.say(string.format(
        '{"status": "%s", "servers": [%s]}',
        healthy and "healthy" or "unhealthy", table.concat(parts, ", ")
    ))
end

-- content phase: the proxy's view of its servers. It keeps no request waiting.
function M.metrics()
    ngx.header["Content-Type"] = "text/plain"
    for _, side in ipairs({ "prefill", "decode" }) do
        for index, peer in ipairs(peers[side]) do
            ngx.say(string.format(
                'omni_%s_running_requests{endpoint="%s:%d"} %d',
                side, peer.host, peer.port, counts:get(key("active", side, index)) or 0
            ))
        end
        ngx.say(string.format('omni_phase_waiting{phase="%s"} 0', side))
    end
end

return M
