-- Prefill, then decode (contract 5.4): one token from prefill in a subrequest, its
-- kv_transfer_params into the original body, which then goes to a decode server.

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

-- Like upstream it works on the text: the first such key wins; max_completion_tokens is untouched.
local function prefill_body(body)
    body = body:gsub(',?%s*"stream_options"%s*:%s*%b{}', "", 1)
    body = body:gsub('("stream"%s*:%s*)%a+', "%1false", 1)
    local found
    body, found = body:gsub('("max_tokens"%s*:%s*)[^,}%s]+', "%11", 1)
    return found > 0 and body or insert_at_end(body, '"max_tokens":1')
end

local function pass_on(answer)
    ngx.status = answer.status
    ngx.header["Content-Type"] = answer.header["Content-Type"]
    ngx.print(answer.body)
    ngx.exit(ngx.HTTP_OK)
end

set_request_id()
local body = read_body()
local answer = ngx.location.capture("/prefill_internal" .. ngx.var.uri, {
    method = ngx.HTTP_POST,
    body = prefill_body(body),
})
if answer.status >= 300 then
    return pass_on(answer)
end
-- Without parameters (prefill's only token ended the answer) decode computes by itself.
local parameters = answer.body:match('"kv_transfer_params"%s*:%s*(%b{})')
if parameters then
    body = insert_at_end(body, '"kv_transfer_params":' .. parameters)
end
ngx.req.set_body_data(body)
