-- {{< fragment NAME >}} inserts the Markdown that `medaug report` made from the results tables: of the runs if there
-- are any, else the published copy, else a note that says how to make it. Links into runs/ that are not there fall
-- back to the published file, or to plain text, so a fresh clone has no dead links. medaug/markdown.py does the same.

local FOLDERS = { "runs/report/", "data/results/report/" }
local NOTHING_YET = "*Nothing here yet: `make report` computes it (about ten minutes on two cores).*"
local NO_FIGURE = "*The figure appears here after* `make report`*.*"

local function read(path)
  local file = io.open(pandoc.path.join({ quarto.project.directory or ".", path }), "r")
  if not file then return nil end
  local text = file:read("a")
  file:close()
  return text
end

-- Returns a link's target, of the run or of what was published; nil if there is neither.
local function locate(target)
  local path = target:sub(2):gsub("#.*$", "")
  if read(path) then return target end
  local study, kind, name = path:match("^runs/([^/]+)/(%w+)/(.+)$")
  local published = { tables = "data/results/", figures = "figures/" }
  if study and published[kind] and read(published[kind] .. study .. "/" .. name) then
    return "/" .. published[kind] .. study .. "/" .. name
  end
  return nil
end

local function resolve_images(text)
  return (text:gsub("(!%b[])%((/runs/[^)%s]+)%)(%b{})", function(caption, target, attributes)
    local found = locate(target)
    return found and caption .. "(" .. found .. ")" .. attributes or NO_FIGURE
  end))
end

local function resolve_links(text)
  return (text:gsub("(%b[])%((/runs/[^)%s]+)%)", function(words, target)
    local found = locate(target)
    if found then return words .. "(" .. found .. ")" end
    return words .. '{.not-here title="appears here after make report"}'
  end))
end

return {
  ["fragment"] = function(args)
    local name = pandoc.utils.stringify(args[1])
    for _, folder in ipairs(FOLDERS) do
      local text = read(folder .. name .. ".md")
      if text then return quarto.utils.string_to_blocks(resolve_links(resolve_images(text))) end
    end
    return quarto.utils.string_to_blocks(NOTHING_YET)
  end,
}
