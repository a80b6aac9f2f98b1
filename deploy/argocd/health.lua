-- Health of a FineTuneJob for Argo CD: argocd-cm, key resource.customizations.health.finetune.dev_FineTuneJob.
-- Complete: Healthy. Failed or Stalled: Degraded. Suspended by its user: Suspended. Everything else: Progressing.

local function condition(kind)
  if obj.status ~= nil and obj.status.conditions ~= nil then
    for _, candidate in ipairs(obj.status.conditions) do
      if candidate.type == kind then
        return candidate
      end
    end
  end
  return nil
end

local function health(status, found, otherwise)
  local message = otherwise
  if found ~= nil then
    message = found.reason
    if found.message ~= nil and found.message ~= "" then
      message = message .. ": " .. found.message
    end
  end
  return { status = status, message = message }
end

local function is_true(kind)
  local found = condition(kind)
  return found ~= nil and found.status == "True"
end

-- Terminal conditions never change again, whatever the generation.
if is_true("Complete") then
  return health("Healthy", condition("Complete"))
end
if is_true("Failed") then
  return health("Degraded", condition("Failed"))
end

local generation = obj.metadata ~= nil and obj.metadata.generation or nil
if obj.status == nil or obj.status.observedGeneration == nil
    or (generation ~= nil and obj.status.observedGeneration < generation) then
  return health("Progressing", nil, "waiting for the operator to see this generation")
end

if is_true("Stalled") then
  return health("Degraded", condition("Stalled"))
end
if is_true("Suspended") then
  return health("Suspended", condition("Suspended"))
end

if is_true("Running") then
  local progress = obj.status.progress
  return health("Progressing", nil, "Training" .. (progress ~= nil and progress.summary ~= nil and (": " .. progress.summary) or ""))
end
-- The first condition that is not met is what the job waits for.
for _, kind in ipairs({ "JobCreated", "Admitted", "PodsScheduled", "Running" }) do
  local found = condition(kind)
  if found ~= nil and found.status == "False" then
    return health("Progressing", found)
  end
end
return health("Progressing", nil, "waiting for the operator")
