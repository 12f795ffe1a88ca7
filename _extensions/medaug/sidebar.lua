-- Before a render: writes the sidebar in story order with the notebook pages that are there (Quarto's `auto:` stops with
-- an error at an empty folder, and shows dead links for absent files). Run by Quarto's own pandoc; no Python needed.

local RUNS, SCRATCH, OUTPUT = "runs", ".quarto/medaug", ".quarto/medaug/sidebar.yml"
local STORY = { "foundations", "phantom" } -- the embedded study, after the models that it starts from; others follow

local function list(folder)
  local ok, names = pcall(pandoc.system.list_directory, folder)
  names = ok and names or {}
  table.sort(names)
  return names
end

local function notebooks(study)
  local folder, found = RUNS .. "/" .. study .. "/notebooks", {}
  for _, name in ipairs(list(folder)) do
    if name:match("^%d%d%-.*%.ipynb$") then found[#found + 1] = folder .. "/" .. name end
  end
  return found
end

local lines = {
  "website:", "  sidebar:", "    contents:",
  "      - href: index.qmd", "        text: The answer",
}

-- `texts` names the pages in the sidebar; without it, each is called by its own title.
local function add_section(title, pages, texts)
  if #pages == 0 then return end
  lines[#lines + 1] = '      - section: "' .. title .. '"'
  lines[#lines + 1] = "        contents:"
  for i, page in ipairs(pages) do
    lines[#lines + 1] = '          - href: "' .. page .. '"'
    if texts then lines[#lines + 1] = '            text: "' .. texts[i] .. '"' end
  end
end

local story, told = {}, {}
for _, study in ipairs(STORY) do
  told[study] = true
  for _, page in ipairs(notebooks(study)) do story[#story + 1] = page end
end
add_section("Step by step", story)
for _, study in ipairs(list(RUNS)) do
  if not told[study] then add_section("Study " .. study, notebooks(study)) end
end
add_section("What came out", { "results.qmd", "claims.qmd" }, { "Results", "Claims" })
add_section("Use it", { "guide.qmd", "cards.qmd" }, { "Run it yourself", "Data and models" })

pandoc.system.make_directory(SCRATCH, true)
local file = assert(io.open(OUTPUT, "w"))
file:write(table.concat(lines, "\n"), "\n")
file:close()
