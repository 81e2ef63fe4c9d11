# A client in Ruby, whose code is generated from the .proto files alone: it calls every rpc once, and says what came of each.
#
#   ruby -I GENERATED client.rb ADDRESS SOURCE DESTINATION LAYOUT
#
# SOURCE is an image at a registry, DESTINATION a repository at another, where it makes tags, LAYOUT the directory of a layout. The answer
# is one JSON object.

require "digest"
require "json"
require "grpc"
require "grpc/health/v1/health_services_pb"
require "occy/v1/pipeline_services_pb"
require "occy/v1/schedule_services_pb"
require "occy/v1/worker_services_pb"
require "occy/v1/blob_services_pb"

include Occy::V1

address, source, destination, layout = ARGV
plain = :this_channel_is_insecure
pipeline = PipelineService::Stub.new(address, plain)
schedules = ScheduleService::Stub.new(address, plain)
blobs = BlobService::Stub.new(address, plain)
said = {}

# The gRPC code of a call that has to fail.
def code
  yield
  raise "it went well"
rescue GRPC::BadStatus => error
  GRPC::Core::StatusCodes.constants.find { |name| GRPC::Core::StatusCodes.const_get(name) == error.code }
end

# The digests of an image's layers, of the bytes that came.
def layers(elements)
  hashes = []
  elements.each do |element|
    case element.element
    when :layer_start then hashes << Digest::SHA256.new
    when :layer_chunk then hashes.last << element.layer_chunk.data
    when :layer_end
      raise "not the digest of what came" unless element.layer_end.digest == "sha256:#{hashes.last.hexdigest}"
    end
  end
  raise "it ends early" unless elements.last.element == :end
  hashes.map { |hash| "sha256:#{hash.hexdigest}" }
end

health = Grpc::Health::V1::Health::Stub.new(address, plain)
said[:health] = health.check(Grpc::Health::V1::HealthCheckRequest.new).status

capabilities = pipeline.list_capabilities(ListCapabilitiesRequest.new)
said[:filters] = capabilities.filters.map(&:name)

inspected = pipeline.inspect_image(InspectImageRequest.new(source: source)).map(&:element).compact
said[:inspected] = inspected.map(&:element).include?(:config_file)

checked = pipeline.check_image(CheckImageRequest.new(source: source)).to_a
said[:checked] = checked.last.part
said[:findings] = checked.count { |answer| answer.part == :finding }

found = pipeline.search_image(SearchImageRequest.new(source: source, pattern: "*"))
said[:hits] = found.flat_map { |answer| answer.hits.to_a }.size

elements = pipeline.read_image(ReadImageRequest.new(source: source)).map(&:element)
said[:read] = layers(elements)

spec = PipelineSpec.new(destination: "#{destination}:written")
parts = [WriteImageRequest.new(spec: spec)] + elements.map { |element| WriteImageRequest.new(element: element) }
said[:written] = pipeline.write_image(parts).result.manifest_digest

spec = PipelineSpec.new(filters: ["normalize-timestamps"], layer_form: :LAYER_FORM_TAR)
parts = [ProcessImageRequest.new(spec: spec)] + elements.map { |element| ProcessImageRequest.new(element: element) }
processed = pipeline.process_image(parts.each).to_a
said[:processed] = layers(processed.map(&:element).compact)
said[:result] = processed.last.part

# The layout is lent: what is asked of it is its index and its blobs. No blob has more bytes than may be sent without credit.
asked = Queue.new
copy = CopyImageRequest.new(destination: "#{destination}:lent")
asked << LendLayoutRequest.new(start: LendStart.new(copy: copy, source: LentSource.new(path: layout)))
requests = Enumerator.new { |requests| while (request = asked.pop) do requests << request end }
pipeline.lend_layout(requests).each do |answer|
  if answer.part == :copy
    said[:lent] = answer.copy.result.manifest_digest if answer.copy.part == :result
    asked << nil if said[:lent]
  elsif answer.part == :ask
    ask = answer.ask
    path = ask.what == :read_index ? "index.json" : "blobs/#{ask.read_blob.digest.sub(":", "/")}"
    data = File.binread("#{layout}/#{path}")
    asked << LendLayoutRequest.new(piece: LendPiece.new(ask: ask.id, data: data))
    digest = "sha256:#{Digest::SHA256.hexdigest(data)}"
    asked << LendLayoutRequest.new(end: LendEnd.new(ask: ask.id, digest: digest, size: data.bytesize))
  end
end

spec = PipelineSpec.new(source: source, destination: "#{destination}:job")
submission = SubmitJobRequest.new(spec: spec, idempotency_key: "once")
id = pipeline.submit_job(submission).job.id
said[:once] = pipeline.submit_job(submission).job.id == id
events = pipeline.watch_job(WatchJobRequest.new(job_id: id)).map(&:event)
sequences = events.map(&:sequence).reject(&:zero?)
said[:without_gaps] = sequences == (1..sequences.size).to_a
said[:state] = pipeline.get_job(GetJobRequest.new(job_id: id)).job.state
said[:listed] = pipeline.list_jobs(ListJobsRequest.new).jobs.map(&:id) == [id]
said[:cancelled] = pipeline.cancel_job(CancelJobRequest.new(job_id: id)).job.state

# A mirror of the image, which is due in a year and made at once.
names = [source, destination].map { |uri| uri.delete_prefix("registry://") }
file = { mirrors: [{ sources: [names[0].rpartition(":").first], targets: [names[1]] }], schedule: { interval: "365d" } }
spec = MirrorSpec.new(config: JSON.generate(file))
put = schedules.put_schedule(PutScheduleRequest.new(schedule_id: "yearly", spec: spec)).schedule
said[:scheduled] = put.timing
said[:due] = put.due_time.seconds - put.create_time.seconds
said[:paused] = schedules.pause_schedule(PauseScheduleRequest.new(schedule_id: "yearly")).schedule.due_time
resumed = schedules.resume_schedule(ResumeScheduleRequest.new(schedule_id: "yearly")).schedule
said[:resumed] = resumed.due_time == put.due_time
run = schedules.run_schedule(RunScheduleRequest.new(schedule_id: "yearly"))
said[:run] = pipeline.watch_job(WatchJobRequest.new(job_id: run.job.id)).to_a.last.event.state_changed.state
got = schedules.get_schedule(GetScheduleRequest.new(schedule_id: "yearly")).schedule
said[:last_run] = got.last_run.job_id == run.job.id && run.started && got.runs == 1
said[:schedules] = schedules.list_schedules(ListSchedulesRequest.new).schedules.map(&:id)
schedules.delete_schedule(DeleteScheduleRequest.new(schedule_id: "yearly"))
said[:deleted] = code { schedules.get_schedule(GetScheduleRequest.new(schedule_id: "yearly")) }

# What no worker has been given, nobody may read or write.
said[:read_blob] = code { blobs.read_blob(ReadBlobRequest.new(attempt: "guessed")).to_a }
start = WriteBlobRequest.new(start: WriteBlobStart.new(attempt: "guessed", kind: :BLOB_KIND_LAYER))
said[:write_blob] = code { blobs.write_blob([start]) }
said[:blob_status] = code { blobs.blob_status(BlobStatusRequest.new(attempt: "guessed", kind: :BLOB_KIND_LAYER)) }

register = Register.new(name: "ruby", version: "1", outputs: ["registry"], slots: 1)
told = WorkerService::Stub.new(address, plain).connect([ConnectRequest.new(register: register)])
said[:worker] = told.next.welcome.worker_id

puts JSON.generate(said)
