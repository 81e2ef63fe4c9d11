//! A source of one image, asked for an image for some platform: that is what it has, or an error says what it is for.

use super::ImageSource;
use super::arrivals::Arrivals;
use super::stored::SourceIndex;
use crate::check::Finding;
use crate::element::Image;
use crate::error::Error;
use crate::manifest::Descriptor;
use crate::platform::PlatformChoice;

/// Sources that choose nothing by platform.
pub(crate) struct ForPlatform {
    source: Box<dyn ImageSource>,
    platform: PlatformChoice,
}

impl ForPlatform {
    /// `source`, if its image is for `platform`; as it is, where that is not required.
    pub(crate) fn hold(
        source: impl ImageSource + 'static,
        platform: &PlatformChoice,
    ) -> Box<dyn ImageSource> {
        let source = Box::new(source);
        if platform.required { Box::new(Self { source, platform: platform.clone() }) } else { source }
    }
}

#[async_trait::async_trait]
impl ImageSource for ForPlatform {
    async fn image(&self) -> Result<Image, Error> {
        let image = self.source.image().await?;
        self.platform.admit(image.config.document.as_ref())?;
        Ok(image)
    }

    fn arrivals(&self) -> Option<Arrivals> {
        self.source.arrivals()
    }

    async fn settle(&self, image: &mut Image) -> Result<(), Error> {
        self.source.settle(image).await
    }

    async fn index(&self) -> Result<Option<SourceIndex>, Error> {
        self.source.index().await
    }

    async fn audit(&self, deep: bool) -> Result<Vec<Finding>, Error> {
        self.source.audit(deep).await
    }

    fn entry(&self, entry: &Descriptor) -> Option<Box<dyn ImageSource>> {
        self.source.entry(entry)
    }
}
