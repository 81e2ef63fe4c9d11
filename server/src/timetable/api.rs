//! The API's calls for schedules: from its messages to the timetable, and back. No decision is made here.

use std::sync::Arc;

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use occy_proto::v1;
use occy_proto::v1::schedule_service_server::ScheduleService;
use prost::Message as _;
use tonic::{Request, Response, Status};

use super::{NO_TIMING, Timetable};
use crate::access::{Caller, Scope};
use crate::credentials::Logins;
use crate::engine::schedules::ScheduleName;
use crate::error::ServiceError;
use crate::grpc::Coordinator;

/// Bytes of schedules in one page.
const PAGE_BYTES: usize = 640 * 1024;

/// The service.
#[derive(Clone, Debug)]
pub struct ScheduleApi {
    /// Who may call, and what is allowed.
    pub coordinator: Arc<Coordinator>,
    /// The schedules.
    pub timetable: Timetable,
}

#[tonic::async_trait]
impl ScheduleService for ScheduleApi {
    async fn put_schedule(
        &self,
        request: Request<v1::PutScheduleRequest>,
    ) -> Result<Response<v1::PutScheduleResponse>, Status> {
        let caller = self.begin(&request)?;
        let v1::PutScheduleRequest { schedule_id, spec, credentials } = request.into_inner();
        let (spec, logins) = (spec.unwrap_or_default(), Logins::of(credentials)?);
        let work = self.coordinator.gate.admit_mirror(&spec, &caller.tenant, &logins).await?;
        if work.deletes() {
            caller.may(Scope::Delete)?;
        }
        let no_timing = || ServiceError::Field { field: "config", problem: NO_TIMING.to_owned() };
        let timing = work.config.schedule.ok_or_else(no_timing)?;
        let put = self.timetable.put(&caller.tenant, schedule_id, spec, &timing, &logins).await?;
        Ok(Response::new(v1::PutScheduleResponse { schedule: Some(put) }))
    }

    async fn get_schedule(
        &self,
        request: Request<v1::GetScheduleRequest>,
    ) -> Result<Response<v1::GetScheduleResponse>, Status> {
        let caller = self.coordinator.access.authorize(&request, Scope::Jobs)?;
        let v1::GetScheduleRequest { schedule_id, tenant } = request.into_inner();
        let found = self.timetable.get(&named(&caller, schedule_id, tenant)?).await?;
        Ok(Response::new(v1::GetScheduleResponse { schedule: Some(found) }))
    }

    async fn list_schedules(
        &self,
        request: Request<v1::ListSchedulesRequest>,
    ) -> Result<Response<v1::ListSchedulesResponse>, Status> {
        let caller = self.coordinator.access.authorize(&request, Scope::Jobs)?;
        let v1::ListSchedulesRequest { page_size, page_token } = request.into_inner();
        let after = match page_token.as_str() {
            "" => None,
            token => Some(read_token(token).ok_or_else(|| ServiceError::Field {
                field: "page_token",
                problem: "is not one of ours".to_owned(),
            })?),
        };
        let count = match page_size {
            0 => 50,
            size => size.min(200) as usize,
        };
        let (mut schedules, mut more) = self.timetable.list(caller.sees(), after.as_ref(), count).await?;
        let mut bytes = 0;
        let fits = schedules.iter().take_while(|schedule| {
            bytes += schedule.encoded_len();
            bytes <= PAGE_BYTES
        });
        let fits = fits.count().max(1);
        more |= fits < schedules.len();
        schedules.truncate(fits);
        let next_page_token = match schedules.last() {
            Some(schedule) if more => token_of(schedule),
            _ => String::new(),
        };
        Ok(Response::new(v1::ListSchedulesResponse { schedules, next_page_token }))
    }

    async fn delete_schedule(
        &self,
        request: Request<v1::DeleteScheduleRequest>,
    ) -> Result<Response<v1::DeleteScheduleResponse>, Status> {
        let caller = self.begin(&request)?;
        let v1::DeleteScheduleRequest { schedule_id, tenant } = request.into_inner();
        let was = self.timetable.delete(&named(&caller, schedule_id, tenant)?).await?;
        Ok(Response::new(v1::DeleteScheduleResponse { schedule: Some(was) }))
    }

    async fn pause_schedule(
        &self,
        request: Request<v1::PauseScheduleRequest>,
    ) -> Result<Response<v1::PauseScheduleResponse>, Status> {
        let caller = self.begin(&request)?;
        let v1::PauseScheduleRequest { schedule_id, tenant } = request.into_inner();
        let paused = self.timetable.pause(&named(&caller, schedule_id, tenant)?, true).await?;
        Ok(Response::new(v1::PauseScheduleResponse { schedule: Some(paused) }))
    }

    async fn resume_schedule(
        &self,
        request: Request<v1::ResumeScheduleRequest>,
    ) -> Result<Response<v1::ResumeScheduleResponse>, Status> {
        let caller = self.begin(&request)?;
        let v1::ResumeScheduleRequest { schedule_id, tenant } = request.into_inner();
        let resumed = self.timetable.pause(&named(&caller, schedule_id, tenant)?, false).await?;
        Ok(Response::new(v1::ResumeScheduleResponse { schedule: Some(resumed) }))
    }

    async fn run_schedule(
        &self,
        request: Request<v1::RunScheduleRequest>,
    ) -> Result<Response<v1::RunScheduleResponse>, Status> {
        let caller = self.begin(&request)?;
        let v1::RunScheduleRequest { schedule_id, tenant } = request.into_inner();
        let (job, started) = self.timetable.run(&named(&caller, schedule_id, tenant)?).await?;
        Ok(Response::new(v1::RunScheduleResponse { job: Some(job), started }))
    }
}

impl ScheduleApi {
    /// Who wants to change something, which nobody can where the coordinator is being stopped.
    fn begin<T>(&self, request: &Request<T>) -> Result<Caller, ServiceError> {
        let caller = self.coordinator.access.authorize(request, Scope::Jobs)?;
        if *self.coordinator.draining.borrow() { Err(ServiceError::Draining) } else { Ok(caller) }
    }
}

/// The schedule that a caller means, if it is one that it sees.
fn named(caller: &Caller, id: String, tenant: Option<String>) -> Result<ScheduleName, ServiceError> {
    let tenant = tenant.map_or_else(|| Arc::clone(&caller.tenant), Into::into);
    if caller.sees().is_some_and(|own| *own != tenant) {
        return Err(ServiceError::NoSuchSchedule(id));
    }
    Ok(ScheduleName { tenant, id })
}

/// Behind which schedule a page begins.
fn token_of(schedule: &v1::Schedule) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(format!("{} {}", schedule.id, schedule.tenant))
}

fn read_token(token: &str) -> Option<ScheduleName> {
    let token = String::from_utf8(BASE64_URL_SAFE_NO_PAD.decode(token).ok()?).ok()?;
    let (id, tenant) = token.split_once(' ')?;
    Some(ScheduleName { tenant: tenant.into(), id: id.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_goes_on_behind_any_schedule() {
        let schedule = v1::Schedule {
            id: "a.b-c".to_owned(),
            tenant: "token:\u{fc} x".to_owned(),
            ..v1::Schedule::default()
        };
        let name = read_token(&token_of(&schedule)).unwrap();
        assert_eq!((&*name.tenant, &*name.id), (&*schedule.tenant, &*schedule.id));
        for bad in ["x", "eA", "\u{fc}"] {
            assert_eq!(read_token(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_client_means_its_own_schedules_alone() {
        let caller = Caller::without_token("token:ci".into());
        let own = named(&caller, "a".to_owned(), None).unwrap();
        assert_eq!(named(&caller, "a".to_owned(), Some("token:ci".to_owned())).unwrap(), own);
        for other in ["", "token:other"] {
            let refused = named(&caller, "a".to_owned(), Some(other.to_owned()));
            assert!(matches!(refused, Err(ServiceError::NoSuchSchedule(id)) if id == "a"));
        }
    }
}
