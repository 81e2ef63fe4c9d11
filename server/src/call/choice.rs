//! A caller that has some of the layers already: nothing is read before it has said which.

use std::collections::HashSet;
use std::sync::Arc;

use futures_util::StreamExt;
use occy_pipeline::element::WrittenLayer;
use occy_pipeline::error::Error;
use occy_pipeline::executor::{Executor, LayerTask};
use occy_pipeline::wire::output::ElementOutput;
use occy_proto::v1::image_element::Element;
use tokio::sync::Mutex;

use super::{Answer, Elements};
use crate::error::ServiceError;

/// Runs the layers that the caller wants, and passes over the others.
pub(super) struct Choosing {
    inner: Arc<dyn Executor>,
    output: Arc<ElementOutput<Answer>>,
    choice: Mutex<Choice>,
}

struct Choice {
    /// Where it comes, until it has.
    awaited: Option<Elements>,
    unwanted: HashSet<u32>,
}

impl Choosing {
    /// Waits for the choice among `elements` when the first layer is to be run.
    pub(super) fn new(
        inner: Arc<dyn Executor>,
        output: Arc<ElementOutput<Answer>>,
        elements: Elements,
    ) -> Arc<Self> {
        let choice = Choice { awaited: Some(elements), unwanted: HashSet::new() };
        Arc::new(Self { inner, output, choice: Mutex::new(choice) })
    }

    async fn is_wanted(&self, index: usize) -> Result<bool, ServiceError> {
        let Choice { awaited, unwanted } = &mut *self.choice.lock().await;
        if let Some(mut elements) = awaited.take() {
            *unwanted = chosen(&mut elements).await?;
        }
        Ok(u32::try_from(index).is_ok_and(|index| !unwanted.contains(&index)))
    }
}

async fn chosen(elements: &mut Elements) -> Result<HashSet<u32>, ServiceError> {
    match elements.next().await {
        Some(Ok(element)) => match element.element {
            Some(Element::LayerChoice(choice)) => Ok(choice.unwanted.into_iter().collect()),
            _ => Err(ServiceError::Elements("the choice of layers does not come".to_owned())),
        },
        Some(Err(_)) | None => Err(ServiceError::Truncated),
    }
}

#[async_trait::async_trait]
impl Executor for Choosing {
    fn at_once(&self) -> usize {
        self.inner.at_once()
    }

    async fn run(&self, task: LayerTask) -> Result<WrittenLayer, Error> {
        match self.is_wanted(task.layer.index).await? {
            true => self.inner.run(task).await,
            false => Ok(self.output.pass_over(&task.layer).await?),
        }
    }
}
